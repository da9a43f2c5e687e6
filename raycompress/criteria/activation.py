"""Activations on calibration data: channels that are seldom or weakly active matter little.

Hu et al. 2016, arXiv 1607.03250 (APoZ); Molchanov et al. 2017, arXiv 1611.06440 (mean activation).

Shapes: C channels of a group.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raycompress.collect import Probe
from raycompress.criteria.criterion import Criterion, Statistics
from raycompress.errors import ConfigError, EvaluationError
from raycompress.structure import ChannelGroup
from raycompress.structure.activations import Site, Sites, activation_sites
from raycompress.structure.leaves import flat
from raycompress.structure.watch import watch
from raycompress.task import move

__all__ = ["APoZ", "ActivationCriterion", "MeanActivation"]


@dataclass(frozen=True, kw_only=True)
class ActivationCriterion(Criterion):
    """Base of the criteria that average something over a channel's activations.

    Activations are what the network has after its norms and activation functions, wherever and
    however the code calls them; see `activation_sites`. The average goes over all examples and
    positions, in double precision, and then over the sites of the group. Sums alone are kept.

    Attributes:
        combine: How the scores at several sites become one score for each channel.
        batches: Calibration batches that are looked at; 0: all.
    """

    combine: Literal["sum", "mean", "max"] = "mean"
    batches: int = 0

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 0:
            name = type(self).__name__
            raise ConfigError(f"{name}.batches must be at least 0, got {self.batches}")

    @abstractmethod
    def summed(self, activations: Tensor, dims: list[int]) -> Tensor:
        """What is averaged, summed over the dims, in double precision."""

    def collect(self, probe: Probe) -> dict[str, Tensor]:
        """Averages for each site, shape (C,), by "group @ site"."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        known: dict[tuple[tuple[int, ...], ...], Sites] = {}
        channels = {group.name: group.num_channels for group in probe.structure.groups}

        model = probe.model
        # The fused recurrent kernels of GPUs show nothing of what is inside.
        opaque = probe.device.type != "cpu" and any(
            isinstance(m, nn.RNNBase) for m in model.modules()
        )
        if opaque:
            model = copy.deepcopy(model).cpu()

        def run(batch: Any) -> Any:
            return probe.task.forward(model, batch)

        def see(site: Site, activations: Tensor) -> None:
            key = f"{site.group} @ {site.name}"
            others = [d for d in range(activations.dim() + 1) if d != site.dim + 1]
            line = self.summed(activations.unsqueeze(0), others).cpu()
            line = line[torch.from_numpy(site.positions)]
            each = torch.full_like(line, activations.numel() / site.size)
            at = torch.from_numpy(site.channels)
            for totals, values in ((sums, line), (counts, each)):
                zeros = torch.zeros(channels[site.group], dtype=torch.float64)
                totals[key] = totals.get(key, zeros).index_add(0, at, values)

        for batch in islice(probe.batches(), self.batches or None):
            batch = move(batch, "cpu") if opaque else batch
            shapes = tuple(tuple(t.shape) for t in flat(batch))
            if shapes not in known:
                known[shapes] = activation_sites(model, probe.structure, run, batch)
            with watch(model, known[shapes], see):
                run(batch)
        return {key: total / counts[key] for key, total in sums.items()}

    def group_scores(
        self, model: nn.Module, group: ChannelGroup, statistics: Statistics
    ) -> list[Tensor]:
        """One score for each site of the group.

        Raises:
            EvaluationError: No activation of the group was seen.
        """
        found = [v for key, v in statistics.items() if key.startswith(f"{group.name} @ ")]
        if not found:
            raise EvaluationError(
                f"no activations of group {group.name!r} were found on calibration data: exclude "
                "it in targets, or take another criterion"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class APoZ(ActivationCriterion):
    """1 - APoZ: the share of examples and positions where a channel is active, above zero.

    APoZ is the average percentage of zeros (equation 1). Counted is what isn't above zero: after
    ReLU that is the zeros, and for functions that have none it is where they are off.
    """

    normalised: ClassVar[bool] = False

    def summed(self, activations: Tensor, dims: list[int]) -> Tensor:
        """Number of active ones."""
        return (activations > 0).sum(dims).double()


@dataclass(frozen=True, kw_only=True)
class MeanActivation(ActivationCriterion):
    """Mean absolute activation; after ReLU that is the mean of the paper.

    Absolute, since values of both signs, as GELU, tanh and linear layers have them, cancel.
    """

    def summed(self, activations: Tensor, dims: list[int]) -> Tensor:
        """Sum of absolute values."""
        return activations.abs().sum(dims, dtype=torch.float64)
