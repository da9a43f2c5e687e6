"""Simulated annealing over kept channel counts within a budget."""

from __future__ import annotations

from dataclasses import dataclass

from raycompress.criteria import criterion
from raycompress.pruning.annealing import Annealer, free_groups
from raycompress.pruning.pruner import Problem, allocator
from raycompress.recalibration import check_recalibration
from raycompress.search import Search

__all__ = ["SimulatedAnnealing"]


@dataclass(frozen=True, kw_only=True)
class SimulatedAnnealing(Annealer):
    """Searches the keep fraction of every channel group within a budget.

    Starts at the uniform allocation. Each step proposes allocations around the current ones, which
    are evaluated at once; the best allocation ever seen wins. See `annealing` for the walk and for
    how it differs from AutoCompress's and NNI's.
    """

    def search(self, problem: Problem) -> Search:
        """Yields at most `chains * neighbours` candidates a step (one more in the first)."""
        groups = free_groups(problem, "SimulatedAnnealing")
        fitter = allocator(problem, groups, "SimulatedAnnealing", self.round_to, self.min_kept)
        yield from check_recalibration(problem.weights, self.recalibrate)
        ranks = criterion(self.criterion, "SimulatedAnnealing.criterion", "channels")
        ranking = yield from problem.rank(ranks, groups)
        winner = yield from self.anneal(
            problem,
            fitter,
            fitter.fit(dict.fromkeys(groups, 1.0)),
            ranking,
            weights=problem.weights,
            stream=str(problem.seed),
        )
        return winner
