"""Soft filter pruning (He et al. 2018, arXiv 1808.06866), as FPGM trains (1811.00250)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raycompress.candidate import Candidate, Training
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import check_counts, check_sparsity, plan_units
from raycompress.search import Search
from raycompress.structure import Structure
from raycompress.targets import POOL_KEYS
from raycompress.weights import Weights

__all__ = ["SoftFilter", "zeroed"]


@dataclass(frozen=True, kw_only=True)
class SoftFilter(Pruner):
    """Zeroes the worst filters after every interval of training and lets them grow back.

    After each of `intervals` the filters are ranked anew, all of them, and those below the
    sparsity are set to zero; the next interval trains all, so that a filter that was cut too early
    returns. At the end they are removed for good. As in the papers only the filters themselves are
    zeroed between intervals; norms and consumers go at the end.

    Attributes:
        criterion: What goes first: "fpgm" (geometric median), "l2", another name, or an import
            path.
        sparsity: Fraction of each group's channels removed, in [0, 1); targets and budgets
            override it.
        intervals: How many, at least 1.
        epochs: Of each interval, above 0; 1 in the papers.
        lr: Peak learning rate of each interval; None takes the task's own. The papers use a tenth
            of it on trained models.
        round_to: Kept counts are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    criterion: str = "fpgm"
    sparsity: float | None = None
    intervals: int = 5
    epochs: float = 1.0
    lr: float | None = None
    round_to: int = 1
    min_kept: int = 1

    understands: ClassVar[tuple[str, ...]] = POOL_KEYS

    def __post_init__(self) -> None:
        criterion(self.criterion, "SoftFilter.criterion", "channels")
        check_counts("SoftFilter", self.round_to, self.min_kept)
        check_sparsity("SoftFilter", self.sparsity)
        if self.intervals < 1:
            raise ConfigError(f"SoftFilter.intervals must be at least 1, got {self.intervals}")
        if self.epochs <= 0:
            raise ConfigError(f"SoftFilter.epochs must be above 0, got {self.epochs:g}")

    def search(self, problem: Problem) -> Search:
        """Yields one dense training for each interval; returns the last one's hard pruning."""
        ranks = criterion(self.criterion, "SoftFilter.criterion", "channels")
        units = plan_units(
            problem,
            ranks,
            "SoftFilter",
            self.sparsity,
            round_to=self.round_to,
            min_kept=self.min_kept,
        )
        weights = problem.weights
        for number in range(1, self.intervals + 1):
            training = Training(self.epochs, self.lr, problem.seed + 1000 * number)
            weights = (yield [Candidate(weights, training=training)])[0].trained()
            scores = yield from problem.scores(ranks, units.names, weights)
            counts, ranking = units.final(scores), problem.ranking("channels", scores)
            if number < self.intervals:
                state = problem.store.get(weights).state
                cut = zeroed(state, problem.structure, ranking.kept(counts))
                weights = problem.store.put(Weights(cut, {}))
        winner: Candidate = problem.candidate(counts, ranking, weights=weights)
        return winner


def zeroed(
    state: Mapping[str, Tensor], structure: Structure, kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A dense state dict whose producing filters of removed channels are zero.

    Args:
        state: Dense.
        structure: Of the model.
        kept: Kept channel indices by group.
    """
    result = dict(state)
    for name, indices in kept.items():
        group = structure.group(name)
        gone = torch.ones(group.num_channels, dtype=torch.bool)
        gone[indices] = False
        for member in group.members:
            if member.role == "producer" and member.parameter in result:
                rows = torch.as_tensor(member.indices)[gone].flatten()
                result[member.parameter] = result[member.parameter].index_fill(member.dim, rows, 0)
    return result
