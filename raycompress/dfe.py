"""What units cost, in dense-forward equivalents (DFE).

1 is the multiply-adds of one pass of the dense model over the validation split. Counted are forward
passes, and training steps as three of them; building, solving and measuring times are not. Each
unit is priced by what was asked for, whatever the number of replicas that it was cut up for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from raycompress.candidate import Candidate
from raycompress.structure import Structure
from raycompress.task import Split
from raycompress.units import Evaluation, HostInfo

__all__ = ["Prices"]

STEP = 3.0
"""Passes that a training step counts as: forward, and twice as much backward."""


@dataclass(frozen=True)
class Prices:
    """Prices units of one task.

    Attributes:
        structure: Of its model.
        evaluation: Settings.
        info: Of the hosts.
    """

    structure: Structure
    evaluation: Evaluation
    info: HostInfo

    def evaluation_of(
        self, candidate: Candidate, counts: Mapping[str, int], split: Split = "validation"
    ) -> float:
        """Judging a candidate; of a race's round, the shards alone after the first.

        Args:
            candidate: Without training.
            counts: Kept channels by group, what its weights have lost included; empty if masked.
            split: On which data.
        """
        examples: float = self.info.num_examples[split]
        start, end = candidate.shards or (0, self.evaluation.num_shards)
        examples *= (end - start) / self.evaluation.num_shards
        dfe = self._relative(counts) * self._passes(examples)
        return dfe + (self._building(candidate, counts) if start == 0 else 0.0)

    def training_of(self, candidate: Candidate, counts: Mapping[str, int]) -> float:
        """Training a candidate, and what comes before it; as `evaluation_of`."""
        training = candidate.training
        assert training is not None
        epochs = training.in_epochs(self.info.steps_per_epoch)
        passes = self._passes(epochs * self.info.num_examples["train"])
        beside = sum(method.dense_passes for method in training.methods)
        step = STEP * self._relative(counts) + beside
        return passes * step + self._building(candidate, counts)

    def collection_of(self, candidate: Candidate) -> float:
        """Collecting statistics, in dense shapes."""
        collector = candidate.collect
        assert collector is not None
        return collector.passes * self._passes(self.info.num_examples["calibration"])

    def _building(self, candidate: Candidate, counts: Mapping[str, int]) -> float:
        """Reconstruction, recalibration, and calibration of quantizers."""
        relative = self._relative(counts)
        dfe = relative * self._calibration(candidate.recalibrate)
        quantize = candidate.quantize
        if quantize is not None and quantize.quantizer.needs_data:
            dfe += relative * quantize.quantizer.passes * self._calibration(quantize.batches)
        if candidate.reconstruct is not None:
            # One look at the order of calls; one pass of the dense model, which answers for all
            # layers (and for the candidates after, on the same host); then, for each layer, the
            # model up to it: on average half of it.
            dfe += relative * self._calibration(1)
            layers = self._num_readers(counts) if counts else len(candidate.kept)
            each = self._calibration(candidate.reconstruct.batches)
            dfe += each * (1.0 + layers * relative / 2)
        return dfe

    def _calibration(self, batches: int) -> float:
        """Dense passes over so many calibration batches, as far as there are any."""
        num = self.info.num_examples["calibration"]
        size = self.evaluation.batch_size
        return self._passes(min(batches, max(num // size, 1)) * min(size, num))

    def _num_readers(self, counts: Mapping[str, int]) -> int:
        """Layers that lost inputs."""
        lost = [self.structure.group(name) for name in counts]
        return len(
            {
                member.parameter
                for group in lost
                if counts[group.name] < group.num_channels
                for member in group.members
                if member.dim == 1 and member.parameter.rpartition(".")[2] == "weight"
            }
        )

    def _relative(self, counts: Mapping[str, int]) -> float:
        return self.structure.cost(counts).macs / self._dense

    @functools.cached_property
    def _dense(self) -> int:
        return max(self.structure.cost().macs, 1)

    def _passes(self, examples: float) -> float:
        return examples / max(self.info.num_examples["validation"], 1)
