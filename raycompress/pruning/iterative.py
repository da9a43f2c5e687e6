"""Iterative pruning: remove some, fine-tune, and again (Han et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from raycompress.candidate import Candidate, Training
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import check_counts, check_sparsity, plan_units
from raycompress.search import Search
from raycompress.targets import POOL_KEYS

__all__ = ["Iterative"]


@dataclass(frozen=True, kw_only=True)
class Iterative(Pruner):
    """Reaches the final sparsity in rounds; each ranks what is left, removes, and fine-tunes.

    Channels really leave the model between rounds, so that every round trains a smaller one;
    single weights are held at zero.

    Attributes:
        criterion: What goes first: a name such as "l1", or an import path.
        sparsity: Fraction removed at the end, in [0, 1); targets and budgets override it.
        rounds: How many, at least 1.
        epochs: Of fine-tuning after each round, above 0.
        schedule: "linear": every round removes as many units; "geometric": the same fraction of
            what is left, as the lottery ticket does.
        lr: Peak learning rate of each round; None takes the task's own.
        round_to: Kept counts of channels are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    criterion: str = "l1"
    sparsity: float | None = None
    rounds: int = 3
    epochs: float = 1.0
    schedule: Literal["linear", "geometric"] = "linear"
    lr: float | None = None
    round_to: int = 1
    min_kept: int = 1

    understands: ClassVar[tuple[str, ...]] = POOL_KEYS

    def __post_init__(self) -> None:
        criterion(self.criterion, "Iterative.criterion")
        check_counts("Iterative", self.round_to, self.min_kept)
        check_sparsity("Iterative", self.sparsity)
        if self.rounds < 1:
            raise ConfigError(f"Iterative.rounds must be at least 1, got {self.rounds}")
        if self.epochs <= 0:
            raise ConfigError(f"Iterative.epochs must be above 0, got {self.epochs:g}")

    def search(self, problem: Problem) -> Search:
        """Yields one candidate a round, which goes on from the last round's weights."""
        ranks = criterion(self.criterion, "Iterative.criterion")
        units = plan_units(
            problem,
            ranks,
            "Iterative",
            self.sparsity,
            round_to=self.round_to,
            min_kept=self.min_kept,
        )
        weights = problem.weights
        winner = Candidate(weights)
        for number in range(1, self.rounds + 1):
            done = number / self.rounds
            scores = yield from problem.scores(ranks, units.names, weights)
            fall = units.share if self.schedule == "linear" else units.geometric
            counts, ranking = fall(done, scores), problem.ranking(ranks.kind, scores)
            training = Training(self.epochs, self.lr, problem.seed + 1000 * number)
            asked = problem.candidate(counts, ranking, weights=weights, training=training)
            weights = (yield [asked])[0].trained()
            winner = replace(asked, weights=weights, training=None)
        return winner
