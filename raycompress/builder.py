"""Models of candidates, from the weights and rankings that one process holds."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.candidate import Candidate, Ranking
from raycompress.data import Splits
from raycompress.errors import TaskError
from raycompress.layer_rows import Answers
from raycompress.masks import Masks, masked_copy, weight_masks
from raycompress.quantization.quantizer import Quantization
from raycompress.recalibration import recalibrate
from raycompress.reconstruction import Reconstruction, lost_inputs, reconstruct
from raycompress.structure import Structure, expand, slim
from raycompress.task import Task
from raycompress.units import Evaluation
from raycompress.weights import Weights, WeightStore

__all__ = ["Builder"]


class Builder:
    """Holds one dense model, the data and the rankings; builds candidates.

    Args:
        task: The user's task, constructed in this process.
        structure: Analysis of the task's model.
        store: Where trained weights are read and written.
        evaluation: Settings.
        device: Where the model runs.
    """

    def __init__(
        self,
        task: Task,
        structure: Structure,
        store: WeightStore,
        evaluation: Evaluation | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.task = task
        self.structure = structure
        self.store = store
        self.evaluation = evaluation if evaluation is not None else Evaluation()
        self.device = torch.device(device)
        self._base = task.build_model().eval()
        self._loaded: str | None = None
        self._states: OrderedDict[str, Weights] = OrderedDict()
        self._rankings: dict[str, Ranking] = {}
        settings = self.evaluation
        self._splits = Splits(task, settings.batch_size, settings.num_shards, self.device)
        self._cpu_splits: Splits | None = None
        self._imitated: tuple[str, int, nn.Module, Answers] | None = None

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises a TaskError if weights aren't those of a model that the task builds."""
        built = {key: tuple(value.shape) for key, value in self._base.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state.items()}
        key = next((k for k in [*built, *given] if built.get(k) != given.get(k)), None)
        if key is not None:
            raise TaskError(
                f"{type(self.task).__name__}.build_model must build models like the one given: "
                f"{key!r} has shape {built.get(key, 'none')} in the task's, "
                f"{given.get(key, 'none')} in the one given"
            )

    def publish(self, ranking: Ranking) -> None:
        """Makes a ranking known."""
        self._rankings[ranking.digest] = ranking

    def share(self, digest: str, weights: Weights) -> None:
        """Gives the host weights that it would otherwise read from the store."""
        self._states[digest] = weights

    def weights(self, digest: str) -> Weights:
        """Weights by digest; the last few stay in memory."""
        if digest not in self._states:
            self._states[digest] = self.store.get(digest)
            while len(self._states) > 4:
                self._states.popitem(last=False)
        self._states.move_to_end(digest)
        return self._states[digest]

    def kept(self, candidate: Candidate) -> dict[str, Tensor]:
        """Kept channel indices of a candidate, by group; empty for the dense model and for masks.

        Raises:
            TaskError: Its ranking or its weights belong to something else.
        """
        weights = self.weights(candidate.weights)
        before = {name: torch.tensor(kept) for name, kept in weights.kept.items()}
        if not candidate.kept:
            return before
        ranking = self._ranking(candidate)
        if ranking.kind == "weights":
            if before:
                raise TaskError(
                    f"weights {candidate.weights} have lost channels: ranking {candidate.ranking} "
                    "of single weights is for dense shapes"
                )
            return before
        kept = ranking.kept(candidate.counts)
        for name, indices in before.items():
            if name in kept and not set(kept[name].tolist()) <= set(indices.tolist()):
                raise TaskError(
                    f"group {name!r}: weights {candidate.weights} lack channels that ranking "
                    f"{candidate.ranking} keeps"
                )
        return {**before, **kept}

    def masks(self, candidate: Candidate) -> Masks:
        """Complete masks of a candidate over the dense model."""
        if candidate.kept and self._ranking(candidate).kind == "weights":
            kept = self._ranking(candidate).kept(candidate.counts)
            return weight_masks(self._base, kept)
        return self.structure.masks(self.kept(candidate))

    def build(self, candidate: Candidate) -> nn.Module:
        """The candidate's model on the device, in eval mode: slim, or masked if fine-grained."""
        weights = self.weights(candidate.weights)
        if weights.quantization is not None:
            return self._quantized(candidate, weights)
        kept = self.kept(candidate)
        if weights.kept and {n: tuple(k.tolist()) for n, k in kept.items()} == dict(weights.kept):
            model = slim(self._base, self.structure, kept)
            model.load_state_dict(dict(weights.state))
        else:
            self._load(candidate.weights)
            if kept:
                model = slim(self._base, self.structure, kept)
            elif candidate.kept:
                model = masked_copy(self._base, self.masks(candidate))
            else:
                model = copy.deepcopy(self._base)
        model = model.to(self.device).eval()
        if candidate.reconstruct is not None:
            self._reconstruct(model, candidate, candidate.reconstruct)
        if candidate.recalibrate:
            batches = self._splits.calibration(candidate.recalibrate)
            recalibrate(model, lambda batch: self.task.forward(model, batch), batches)
        if candidate.quantize is not None:
            self._quantize(model, candidate.quantize)
        return model

    def float_twin(self, candidate: Candidate) -> nn.Module:
        """What a quantized candidate computes with in float, on the device, in eval mode.

        Of weights that are quantized already, with others in their place: theirs aren't stored.
        """
        if self.weights(candidate.weights).quantization is None:
            return self.build(replace(candidate, quantize=None))
        kept = self.kept(candidate)
        model = slim(self._base, self.structure, kept) if kept else copy.deepcopy(self._base)
        return model.to(self.device).eval()

    def quantization(self, candidate: Candidate) -> Quantization | None:
        """How a candidate is quantized: as it asks, or in its weights already."""
        record = self.weights(candidate.weights).quantization
        return candidate.quantize if record is None else Quantization.from_key(record)

    def cpu_calibration(self, number: int) -> list[Any]:
        """The first so many calibration batches, on the CPU."""
        if self._cpu_splits is None:
            cpu = torch.device("cpu")
            same = self.device == cpu
            self._cpu_splits = (
                self._splits
                if same
                else Splits(self.task, self.evaluation.batch_size, self.evaluation.num_shards, cpu)
            )
        return self._cpu_splits.calibration(number)

    def _quantize(self, model: nn.Module, how: Quantization) -> None:
        """Gives a float model its quantizers, in place, and calibrates them."""
        how.prepare(model)
        model.eval()
        if how.quantizer.needs_data:
            how.quantizer.calibrate(model, self.task.forward, self._splits.calibration(how.batches))

    def _quantized(self, candidate: Candidate, weights: Weights) -> nn.Module:
        """A model of weights that are quantized already, as they were stored.

        Raises:
            TaskError: The candidate asks for another model than that.
        """
        assert weights.quantization is not None
        how = Quantization.from_key(weights.quantization)
        kept = self.kept(candidate)
        same = {name: tuple(indices.tolist()) for name, indices in kept.items()}
        for asked, what in (
            (candidate.quantize not in (None, how), "quantized in another way"),
            (same != dict(weights.kept), "pruned"),
            (bool(candidate.recalibrate), "recalibrated"),
            (candidate.reconstruct is not None, "reconstructed"),
        ):
            if asked:
                raise TaskError(f"weights {candidate.weights} are quantized: can't be {what} now")
        model = slim(self._base, self.structure, kept) if kept else copy.deepcopy(self._base)
        how.restore(model, weights.state)
        if candidate.kept and not kept:
            model = masked_copy(model, self.masks(candidate))
        return model.to(self.device).eval()

    def _reconstruct(self, model: nn.Module, candidate: Candidate, how: Reconstruction) -> None:
        kept, masks = self.kept(candidate), self.masks(candidate)
        if kept:
            layers, outputs = lost_inputs(self.structure, kept)
        else:
            parameters = {f"{name}.weight": name for name, _ in model.named_modules()}
            layers = {parameters[key]: mask for key, mask in masks.items() if key in parameters}
            outputs = {}
        batches = self._splits.calibration(how.batches)
        # What candidates of one search imitate is the same, and is asked once.
        if self._imitated is None or self._imitated[:2] != (how.dense, how.batches):
            # In dense shapes, whatever those weights have lost: `outputs` counts dense channels.
            self._load(how.dense)
            dense = copy.deepcopy(self._base).to(self.device).eval()
            self._imitated = (how.dense, how.batches, dense, {})
        *_, dense, known = self._imitated
        reconstruct(
            model,
            dense,
            layers,
            outputs,
            self.task.forward,
            batches,
            damping=how.damping,
            known=known,
        )

    def _load(self, digest: str) -> None:
        """Loads weights into the host's own model, those of a slim one in their dense places."""
        if self._loaded == digest:
            return
        self._loaded = None
        weights = self.weights(digest)
        if weights.quantization is not None:
            raise TaskError(f"weights {digest} are quantized: float ones are needed here")
        state: Mapping[str, Tensor] = weights.state
        if weights.kept:
            kept = {name: torch.tensor(indices) for name, indices in weights.kept.items()}
            state = expand(self.structure, self._base, weights.state, kept)
        self._base.load_state_dict(dict(state))
        self._loaded = digest

    def _ranking(self, candidate: Candidate) -> Ranking:
        if candidate.ranking not in self._rankings:
            raise TaskError(f"ranking {candidate.ranking} was not published to this executor")
        return self._rankings[candidate.ranking]
