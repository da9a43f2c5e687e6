"""Fine-grained magnitude pruning (Han et al. 2015): single weights, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from raycompress.criteria import Magnitude, parameter_name
from raycompress.errors import BudgetError, ConfigError
from raycompress.masks import num_kept
from raycompress.pruning.one_shot import check_sparsity, sparsity_of
from raycompress.pruning.pruner import Problem, Pruner
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
        layers = problem.layers()
        modules = dict(problem.model.named_modules())
        sizes = {}
        for name in layers:
            weight = modules[name].weight
            sizes[name] = int(weight.numel())
        if problem.budget is not None:
            shared = self._budget_sparsity(problem, sum(sizes.values()))
            sparsities = dict.fromkeys(layers, shared)
        else:
            sparsities = {
                name: sparsity_of("Level", name, self.sparsity, target)
                for name, target in layers.items()
            }
        ranking = yield from problem.rank(Magnitude(), list(layers))
        counts = {parameter_name(name): num_kept(sizes[name], sparsities[name]) for name in layers}
        winner: Candidate = problem.candidate(counts, ranking)
        return winner

    def _budget_sparsity(self, problem: Problem, prunable: int) -> float:
        budget = problem.budget
        assert budget is not None
        resources = [name for name, _ in budget.limits]
        if resources != ["params"]:
            raise ConfigError(
                f"Level removes single weights, which saves parameters alone; "
                f"its budget can't be {budget}"
            )
        total = sum(parameter.numel() for parameter in problem.model.parameters())
        allowed = budget.limits[0][1].absolute(total)
        layers = len(problem.layers())
        sparsity = max(0.0, (total - allowed + layers) / prunable)  # one more for each floor
        if sparsity >= 1:
            least = total - prunable + layers
            raise BudgetError(
                f"budget {budget} can't be reached: with one weight left in each of the "
                f"{layers} targeted layers the model keeps params {100 * least / total:.3g}%"
            )
        return sparsity
