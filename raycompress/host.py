"""The model host: builds candidates from the weights that it holds, trains and evaluates them.

One host stands in each replica, and one in the `LocalExecutor`; they run the same code, so that a
search is answered alike everywhere.
"""

from __future__ import annotations

import copy
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from raycompress.candidate import Candidate, Ranking, Shard, Training
from raycompress.collect import Collector, Probe
from raycompress.data import Splits
from raycompress.errors import StorageError, TaskError
from raycompress.identity import data_digest, numeric_class, task_digest
from raycompress.layer_rows import Answers
from raycompress.masks import Masks, masked_copy, weight_masks
from raycompress.method import TrainingRun, train_within
from raycompress.quantization.quantizer import Quantization
from raycompress.recalibration import recalibrate
from raycompress.reconstruction import Reconstruction, lost_inputs, reconstruct
from raycompress.storage import Place, place_of, staged
from raycompress.structure import Structure, expand, slim
from raycompress.structure.latency.measure import LatencyRow, measure
from raycompress.structure.latency.table import LatencyTable, latency_table
from raycompress.task import SPLITS, Progress, Split, Task
from raycompress.units import Evaluation, HostInfo, Unit, UnitResult
from raycompress.weights import Weights, WeightStore

__all__ = ["MAX_BUILT", "ModelHost"]

MAX_BUILT = 8
"""Slim models that are kept while their candidates race."""


class ModelHost:
    """Holds one dense model, the data and the rankings; answers units.

    Args:
        task: The user's task, constructed in this process.
        structure: Analysis of the task's model.
        store: Where trained weights are read and written.
        evaluation: Settings.
        device: Where the model runs.
        name: In results and logs.
    """

    def __init__(
        self,
        task: Task,
        structure: Structure,
        store: WeightStore,
        evaluation: Evaluation | None = None,
        device: torch.device | str = "cpu",
        name: str = "local",
    ) -> None:
        self.task = task
        self.structure = structure
        self.store = store
        self.evaluation = evaluation if evaluation is not None else Evaluation()
        self.device = torch.device(device)
        self.name = name
        self.progress: tuple[int, int, float] | None = None
        self._whole = type(task).evaluate is not Task.evaluate
        self._base = task.build_model().eval()
        self._loaded: str | None = None
        self._states: OrderedDict[str, Weights] = OrderedDict()
        self._rankings: dict[str, Ranking] = {}
        settings = self.evaluation
        self._splits = Splits(task, settings.batch_size, settings.num_shards, self.device)
        self._imitated: tuple[str, int, nn.Module, Answers] | None = None
        self._built: OrderedDict[Candidate, nn.Module] = OrderedDict()

    def info(self) -> HostInfo:
        """What the executor must know of this host."""
        datasets = {split: self._splits.dataset(split) for split in SPLITS}  # type: ignore[arg-type]
        return HostInfo(
            task=task_digest(self.task),
            data=data_digest(datasets),
            num_examples={split: len(data) for split, data in datasets.items()},
            steps_per_epoch=self._steps_per_epoch(),
            numeric_class=numeric_class(self.device, self.evaluation.threads),
            whole=self._whole,
        )

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

    def run(self, unit: Unit, progress: Progress | None = None) -> UnitResult:
        """Trains or evaluates; an exception in it is the candidate's failure, and an answer."""
        start = time.perf_counter()
        try:
            with self.evaluation.own_threads():
                if unit.candidate.collect is not None:
                    digest = self._collect(unit.candidate, unit.candidate.collect)
                    result = UnitResult(weights=digest)
                elif unit.candidate.training is not None:
                    digest = self._train(unit.candidate, unit.candidate.training, progress)
                    result = UnitResult(weights=digest)
                else:
                    result = UnitResult(shards=self._evaluate(unit))
        except StorageError:  # no candidate's failure
            raise
        except Exception as error:
            self._built.clear()
            message = str(error).strip().splitlines()
            result = UnitResult(failure=f"{type(error).__name__}: {message[0] if message else ''}")
        finally:
            self.progress = None
        seconds = time.perf_counter() - start
        return UnitResult(result.shards, result.weights, result.failure, seconds, self.name)

    def latency(
        self,
        candidates: Mapping[str, Candidate],
        batch_sizes: Sequence[int],
        repeats: int,
        max_seconds: float | None = None,
    ) -> list[LatencyRow]:
        """Measures candidates against each other on this host's device, interleaved."""
        models = {name: self.build(each) for name, each in candidates.items()}
        with self.evaluation.own_threads():
            return measure(
                models,
                self.task.example_inputs(),
                batch_sizes=batch_sizes,
                repeats=repeats,
                max_seconds=max_seconds,
                device=self.device,
            )

    def latency_table(
        self, batch_size: int, folder: str | Place | None, max_seconds: float
    ) -> LatencyTable:
        """The latency table of the task's model on this host's device; see `latency_table`."""
        stage = nullcontext(None) if folder is None else staged(place_of(folder))
        with self.evaluation.own_threads(), stage as local:
            return latency_table(
                self._base,
                self.structure,
                self.task.example_inputs(),
                batch_size=batch_size,
                device=self.device,
                folder=local,
                max_seconds=max_seconds,
            )

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

    def _train(self, candidate: Candidate, training: Training, progress: Progress | None) -> str:
        epochs = training.in_epochs(self._steps_per_epoch())
        how = self._quantization(candidate, epochs)
        model = self.build(candidate.with_training(None))
        kept = self.kept(candidate)
        methods = (
            training.methods if how is None else (*training.methods, *how.quantizer.methods(model))
        )
        run = TrainingRun(
            model=model,
            task=copy.copy(self.task),
            structure=self.structure,
            masks=self.masks(candidate) if candidate.kept and not kept else {},
            device=self.device,
            weights=self.weights,
            build=lambda digest: self.build(Candidate(digest)),
        )

        def report(step: int, num_steps: int, loss: float) -> None:
            self.progress = (step, num_steps, loss)
            if progress is not None:
                progress(step, num_steps, loss)

        train_within(
            run,
            methods,
            epochs=epochs,
            lr=training.lr,
            seed=training.seed,
            progress=report,
        )
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        plain = {name: tuple(indices.tolist()) for name, indices in kept.items()}
        extra = {name: tensor.cpu() for name, tensor in run.extra.items()}
        record = None if how is None else how.key()
        return self.store.put(Weights(state, plain, extra, record))

    def _quantization(self, candidate: Candidate, epochs: float) -> Quantization | None:
        """How a candidate is quantized, now or in its weights already; checked.

        Args:
            candidate: Evaluated or trained.
            epochs: Passes over the train split that it is trained for.

        Raises:
            ConfigError: Its quantizer needs training and gets none, or has none and gets it.
        """
        record = self.weights(candidate.weights).quantization
        if record is not None:
            return Quantization.from_key(record)
        if candidate.quantize is not None:
            candidate.quantize.check_training(epochs, self._steps_per_epoch())
        return candidate.quantize

    def _steps_per_epoch(self) -> int:
        return -(-len(self._splits.dataset("train")) // self.task.batch_size)

    def _collect(self, candidate: Candidate, collector: Collector) -> str:
        """Collects statistics of a candidate in dense shapes; returns the digest they have."""
        self._load(candidate.weights)
        model = masked_copy(self._base, self.masks(candidate)).to(self.device).eval()
        batches = self._splits.batches
        probe = Probe(
            model=model,
            structure=self.structure,
            task=self.task,
            device=self.device,
            batches=lambda: iter(batches("calibration")),
        )
        return self.store.put(Weights(collector.collect(probe), {}))

    def _evaluate(self, unit: Unit) -> tuple[Shard, ...]:
        self._quantization(unit.candidate, 0.0)
        model = self._model(unit.candidate)
        if self._whole:
            value = self.task.evaluate(model, unit.split)
            if value is None:
                raise TaskError(f"{type(self.task).__name__}.evaluate returned None")
            if not math.isfinite(value):
                raise TaskError(f"evaluate must return a finite number, got {float(value)}")
            return (Shard(1, float(value), -float(value)),)  # such a task has no loss to sum
        with torch.inference_mode():
            return tuple(self._shard(model, unit.split, index) for index in unit.shards)

    def _model(self, candidate: Candidate) -> nn.Module:
        """A candidate's model; those in a race are kept for its next round."""
        whole = replace(candidate, shards=None)
        if whole not in self._built:
            while len(self._built) >= (1 if candidate.shards is None else MAX_BUILT):
                self._built.popitem(last=False)
            self._built[whole] = self.build(whole)
        self._built.move_to_end(whole)
        return self._built[whole]

    def _shard(self, model: nn.Module, split: Split, index: int) -> Shard:
        count, score, loss = 0, 0.0, 0.0
        for batch in self._splits.batches(split, index):
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
            ):
                outputs = self.task.forward(model, batch)
            scores = self.task.score(outputs, batch)
            if scores.dim() != 1:
                raise TaskError(
                    f"{type(self.task).__name__}.score must return one number for each example, "
                    f"got shape {tuple(scores.shape)}"
                )
            size = scores.shape[0]
            count += size
            score += float(scores.double().sum())
            loss += float(self.task.loss(outputs, batch)) * size
        if not (math.isfinite(score) and math.isfinite(loss)):
            raise TaskError(
                f"score and loss must be finite, got {score} and {loss} on {split} shard {index}"
            )
        return Shard(count, score, loss)
