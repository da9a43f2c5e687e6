"""Fine-grained magnitude pruning (Han et al. 2015): single weights, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from raycompress.criteria import Magnitude
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import check_sparsity, plan_units
from raycompress.search import Candidate, Search

__all__ = ["Level"]


@dataclass(frozen=True, kw_only=True)
class Level(Pruner):
    """Fine-grained magnitude pruning, layer by layer; the model keeps its shape.

    Of the n weights of a layer, the floor(n * sparsity) smallest go; ties by index, so that the
    count is exact. Biases and norms stay. With a budget of parameters, all targeted layers get the
    one sparsity that meets it (zeros don't count as parameters).

    Attributes:
        sparsity: Fraction of each layer's weights removed, in [0, 1); targets override it.
    """

    sparsity: float | None = None

    def __post_init__(self) -> None:
        check_sparsity("Level", self.sparsity)

    def search(self, problem: Problem) -> Search:
        """Returns at once."""
        plan = plan_units(problem, Magnitude(), "Level", self.sparsity)
        ranking = yield from problem.rank(Magnitude(), plan.names)
        counts = plan.counts(1.0)
        winner: Candidate = problem.candidate(counts, ranking)
        return winner
