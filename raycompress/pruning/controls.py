"""Controls: what a pruner must beat to be worth its cost (Liu et al. 2019, arXiv 1810.05270)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from raycompress.candidate import Candidate, Training, Trial
from raycompress.criteria import L1, Criterion, Random
from raycompress.errors import ConfigError
from raycompress.pruning.lottery_ticket import reinitialised
from raycompress.pruning.one_shot import ChannelPruner
from raycompress.pruning.pruner import Problem
from raycompress.search import Search
from raycompress.weights import Weights

__all__ = ["FromScratch", "RandomFilter"]


@dataclass(frozen=True, kw_only=True)
class RandomFilter(ChannelPruner):
    """Removes channels at random.

    Attributes:
        draw: Seed of the draws.
    """

    draw: int = 0

    def scorer(self) -> Criterion:
        """Uniform draws."""
        return Random(seed=self.draw)


@dataclass(frozen=True, kw_only=True)
class FromScratch(ChannelPruner):
    """The small architecture, trained from new random weights.

    Give it the epochs that the others' pretraining, search and recovery took together, or the
    comparison isn't fair. Which channels stay doesn't matter: all get new weights.

    Attributes:
        epochs: Of training, above 0.
        lr: Peak learning rate; None takes the task's own.
    """

    epochs: float = 10.0
    lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs <= 0:
            raise ConfigError(f"FromScratch.epochs must be above 0, got {self.epochs:g}")

    def scorer(self) -> Criterion:
        """Any would do."""
        return L1()

    def prepared(self, problem: Problem) -> Generator[Sequence[Candidate], list[Trial], str]:
        """Draws new weights."""
        fresh = reinitialised(problem.model, problem.seed)
        yield from ()
        return problem.store.put(Weights(fresh.state_dict(), {}))

    def search(self, problem: Problem) -> Search:
        """Yields the training of the small model."""
        winner = yield from super().search(problem)
        training = Training(self.epochs, self.lr, problem.seed)
        trained = (yield [winner.with_training(training)])[0].trained()
        return replace(winner, weights=trained)
