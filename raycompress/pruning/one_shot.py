"""One-shot pruners: rank once, remove once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from raycompress.criteria import L1, Criterion, Magnitude
from raycompress.errors import BudgetError, ConfigError
from raycompress.masks import num_kept
from raycompress.pruning.pruner import Problem, Pruner, allocator
from raycompress.search import Candidate, Search

__all__ = ["L1Filter", "Level"]


def _check_sparsity(pruner: str, sparsity: float | None) -> None:
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ConfigError(f"{pruner}.sparsity must be in [0, 1), got {sparsity:g}")


def _sparsity_of(pruner: str, name: str, own: float | None, target: float | None) -> float:
    sparsity = target if target is not None else own
    if sparsity is None:
        raise ConfigError(
            f"{pruner} needs a sparsity for {name!r}: give {pruner}.sparsity, "
            "targets.sparsity, or a budget"
        )
    return sparsity


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

    criterion: ClassVar[Criterion] = Magnitude()

    def __post_init__(self) -> None:
        _check_sparsity("Level", self.sparsity)

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
                name: _sparsity_of("Level", name, self.sparsity, target)
                for name, target in layers.items()
            }
        ranking = yield from problem.rank(self.criterion, list(layers))
        counts = {
            f"{name}.weight" if name else "weight": num_kept(sizes[name], sparsities[name])
            for name in layers
        }
        return problem.candidate(counts, ranking)

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


@dataclass(frozen=True, kw_only=True)
class L1Filter(Pruner):
    """Removes the channels whose filters have the smallest L1 norm (arXiv 1608.08710).

    Of the n channels of a group, floor(n * sparsity) go. With a budget instead, every group keeps
    the same fraction of its channels: the largest that meets the budget ("uniform L1").

    Deviations from the paper: channels that residual connections, concatenation or grouped
    convolutions couple are ranked together and go together, by the sum of the layers' normalised
    scores, where the paper prunes only uncoupled layers of residual nets.

    Attributes:
        sparsity: Fraction of each group's channels removed, in [0, 1); targets override it.
        round_to: Kept counts are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    sparsity: float | None = None
    round_to: int = 1
    min_kept: int = 1

    criterion: ClassVar[Criterion] = L1()

    def __post_init__(self) -> None:
        _check_sparsity(type(self).__name__, self.sparsity)
        for name in ("round_to", "min_kept"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{type(self).__name__}.{name} must be at least 1, got {getattr(self, name)}"
                )

    def search(self, problem: Problem) -> Search:
        """Returns at once."""
        name = type(self).__name__
        groups = problem.groups()
        if problem.budget is not None:
            fixed = [g for g, sparsity in groups.items() if sparsity is not None]
            if fixed:
                raise ConfigError(
                    f"targets give {fixed[0]!r} a sparsity, and the job has a budget: "
                    "they can't both decide"
                )
            fit = allocator(problem, list(groups), name, self.round_to, self.min_kept).fit
            counts = fit(dict.fromkeys(groups, 1.0))
        else:
            counts = {}
            for group_name, target in groups.items():
                group = problem.structure.group(group_name)
                counts[group_name] = num_kept(
                    group.num_channels,
                    _sparsity_of(name, group_name, self.sparsity, target),
                    round_to=max(self.round_to, group.multiple),
                    min_kept=max(self.min_kept, group.min_kept),
                )
        ranking = yield from problem.rank(self.criterion, list(groups))
        winner: Candidate = problem.candidate(counts, ranking)
        return winner
