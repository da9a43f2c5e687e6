"""One-shot pruning of channels: rank once, remove once; the criterion is what differs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from raycompress.candidate import Candidate, Trial
from raycompress.criteria import L1, L2, Criterion, criterion
from raycompress.errors import BudgetError, ConfigError
from raycompress.pruning.allocation import Competition, below_budget
from raycompress.pruning.pruner import Problem, Pruner, allocator
from raycompress.pruning.units import Units, check_counts, check_sparsity, plan_units
from raycompress.search import Search
from raycompress.targets import POOL_KEYS

__all__ = ["ChannelPruner", "L1Filter", "L2Filter", "OneShot"]


@dataclass(frozen=True, kw_only=True)
class ChannelPruner(Pruner):
    """Base of the pruners that score channels once and remove those with the lowest scores.

    Channels that residual connections, concatenation or grouped convolutions couple are ranked
    together and go together, so the result is always consistent ("dependency-aware").

    With `scope: group`, floor(n * sparsity) of the n channels of each group go; with a budget,
    every group keeps the same fraction, the largest that meets it. With `scope: global`, all
    groups' channels compete: floor(N * sparsity) of all N go, lowest scores first, or with a
    budget as few as meet it; no group is emptied.

    Attributes:
        sparsity: Fraction of channels removed, in [0, 1); targets override it.
        scope: "group" or "global".
        round_to: Kept counts are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    sparsity: float | None = None
    scope: Literal["group", "global"] = "group"
    round_to: int = 1
    min_kept: int = 1

    understands: ClassVar[tuple[str, ...]] = POOL_KEYS

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_sparsity(name, self.sparsity)
        if self.scope not in ("group", "global"):
            raise ConfigError(f"{name}.scope must be 'group' or 'global', got {self.scope!r}")
        check_counts(name, self.round_to, self.min_kept)

    @abstractmethod
    def scorer(self) -> Criterion:
        """The criterion."""

    def prepared(self, problem: Problem) -> Generator[Sequence[Candidate], list[Trial], str]:
        """Digest of the weights that are scored and pruned; the dense model's own by default."""
        yield from ()
        return problem.weights

    def search(self, problem: Problem) -> Search:
        """Returns as soon as the channels are scored."""
        chosen, name = self.scorer(), type(self).__name__
        units = plan_units(
            problem,
            chosen,
            name,
            self.sparsity,
            compete=self.scope == "global",
            round_to=self.round_to,
            min_kept=self.min_kept,
        )
        contest = self.scope == "global" and problem.budget is not None
        if contest:  # what can't be met is refused before anything is scored
            allocator(problem, units.names, name, self.round_to, self.min_kept)
        weights = yield from self.prepared(problem)
        scores = yield from problem.scores(chosen, units.names, weights)
        counts = self._within(problem, units, scores) if contest else units.final(scores)
        ranking = problem.ranking(chosen.kind, scores)
        winner: Candidate = problem.candidate(counts, ranking, weights=weights)
        return winner

    def _within(
        self, problem: Problem, units: Units, scores: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """Counts with as few removed under one threshold as meets the budget."""
        contest = Competition(scores, units.least)
        name = type(self).__name__
        fit = allocator(problem, units.names, name, self.round_to, self.min_kept)

        def counts(num_removed: int) -> dict[str, int]:
            return units.rounded(contest.counts(num_removed))

        found = below_budget(counts, contest.most, fit.meets)
        if not fit.meets(found):
            raise BudgetError(
                f"budget {problem.budget} can't be reached: max_sparsity_per_layer of targets "
                "keeps too many channels"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class OneShot(ChannelPruner):
    """Any criterion of channels, also one of your own.

    Attributes:
        criterion: A name such as "l1", or an import path "package.module:Class".
        combine: How the scores of a group's layers become one for each channel: "sum", "mean" or
            "max"; None: as the criterion has it.
    """

    criterion: str = "l1"
    combine: Literal["sum", "mean", "max"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scorer()

    def scorer(self) -> Criterion:
        """The criterion of that name."""
        found = criterion(self.criterion, "OneShot.criterion", "channels")
        return found if self.combine is None else replace(found, combine=self.combine)


@dataclass(frozen=True, kw_only=True)
class L1Filter(ChannelPruner):
    """Removes the channels whose filters have the smallest L1 norm (arXiv 1608.08710).

    With a budget this is "uniform L1", the control of most papers.

    Deviation from the paper, which prunes only uncoupled layers of residual nets: coupled channels
    are ranked together, by the sum of the layers' normalised scores.
    """

    def scorer(self) -> Criterion:
        """Sum of absolute weights."""
        return L1()


@dataclass(frozen=True, kw_only=True)
class L2Filter(ChannelPruner):
    """Removes the channels whose filters have the smallest Euclidean norm."""

    def scorer(self) -> Criterion:
        """Euclidean norm."""
        return L2()
