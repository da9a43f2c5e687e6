"""A criterion and a pruner of one's own, and how a job names them: see own_algorithms.yaml.

Nothing is registered: `jobs.own_algorithms:Spread` is found by its import path, on every replica.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import Tensor

from raycompress import Pruner
from raycompress.criteria import L2, Criterion
from raycompress.pruning import Problem
from raycompress.pruning.pruner import allocator
from raycompress.search import Search


@dataclass(frozen=True, kw_only=True)
class Spread(Criterion):
    """A filter whose weights are all alike does little more than blur: it goes first."""

    def score(self, weight: Tensor) -> Tensor:
        """Variance of what each channel owns: (C, P) -> (C,), higher = keep."""
        return weight.var(dim=1, unbiased=False)


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Pruner):
    """Draws allocations that meet the budget, and keeps the one with the lowest validation loss.

    Attributes:
        tries: How many are drawn, at least 1; all are evaluated at once.
    """

    tries: int = 8

    def search(self, problem: Problem) -> Search:
        """Proposes, is answered, returns the winner; where the work runs is not its business."""
        groups = list(problem.groups())
        fit = allocator(problem, groups, "RandomSearch", round_to=1, min_kept=2).fit
        ranking = yield from problem.rank(L2(), groups)
        draw = random.Random(problem.seed)
        trials = yield [
            problem.candidate(fit({g: draw.uniform(0.2, 1) for g in groups}), ranking)
            for _ in range(self.tries)
        ]
        return min(trials, key=lambda trial: trial.loss).candidate
