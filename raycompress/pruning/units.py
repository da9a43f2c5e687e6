"""What a pruner removes, and how much of each in the end: the start of nearly every pruner.

Units are the channels of groups, or the single weights of layers, as the criterion has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raycompress.criteria import Criterion, parameter_name
from raycompress.errors import BudgetError, ConfigError
from raycompress.masks import num_kept
from raycompress.pruning.pruner import Problem, allocator

__all__ = ["Units", "check_sparsity", "plan_units", "removable"]


@dataclass(frozen=True)
class Units:
    """How many units there are under each key of a ranking, and what is to stay.

    Attributes:
        names: Of groups or layers, as criteria take them.
        num: Units under each key.
        sparsity: Final fraction removed under each key.
        step: Kept counts under a key are multiples of this.
        min_kept: Fewest units under each key.
    """

    names: list[str]
    num: Mapping[str, int]
    sparsity: Mapping[str, float]
    step: Mapping[str, int]
    min_kept: Mapping[str, int]

    def counts(self, fraction: float) -> dict[str, int]:
        """Kept counts with this fraction of each final sparsity; 1.0: exactly the final counts."""
        return {key: self._count(key, self.sparsity[key] * fraction) for key in self.num}

    def between(self, initial: float, progress: float) -> dict[str, int]:
        """Kept counts on the way from an initial sparsity (0.0) to each final one (1.0)."""
        return {
            key: self._count(key, final + (min(initial, final) - final) * (1 - progress))
            for key, final in self.sparsity.items()
        }

    def counts_kept(self, fraction: float) -> dict[str, int]:
        """Kept counts if the kept share falls geometrically: (1 - final sparsity) ** fraction."""
        return {key: self._count(key, 1 - (1 - self.sparsity[key]) ** fraction) for key in self.num}

    def _count(self, key: str, sparsity: float) -> int:
        return num_kept(
            self.num[key], sparsity, round_to=self.step[key], min_kept=self.min_kept[key]
        )


def plan_units(
    problem: Problem,
    criterion: Criterion,
    pruner: str,
    sparsity: float | None,
    round_to: int = 1,
    min_kept: int = 1,
) -> Units:
    """The units that a criterion ranks, each key with its final sparsity.

    A budget decides the sparsity if there is one: the same kept fraction everywhere, the largest
    that meets it. Else targets do, and where they don't, the pruner.

    Args:
        problem: Model, targets and budget.
        criterion: Its kind says what the units are.
        pruner: Its name, for messages.
        sparsity: The pruner's own; None: budget or targets must decide.
        round_to: Kept counts of channels are multiples of this.
        min_kept: Fewest channels of a group.

    Raises:
        ConfigError: Nothing decides, or two things do.
        BudgetError: The budget can't be met.
    """
    if criterion.kind == "weights":
        return _weights(problem, pruner, sparsity)
    targets = problem.groups()
    groups = {name: problem.structure.group(name) for name in targets}
    num = {name: group.num_channels for name, group in groups.items()}
    if problem.budget is not None:
        _undecided(targets)
        fit = allocator(problem, list(targets), pruner, round_to, min_kept).fit
        kept = fit(dict.fromkeys(targets, 1.0))
        wanted = {name: 1 - kept[name] / num[name] for name in groups}
    else:
        wanted = {n: sparsity_of(pruner, n, sparsity, target) for n, target in targets.items()}
    return Units(
        names=list(targets),
        num=num,
        sparsity=wanted,
        step={name: math.lcm(round_to, group.multiple) for name, group in groups.items()},
        min_kept={name: max(min_kept, group.min_kept) for name, group in groups.items()},
    )


def _weights(problem: Problem, pruner: str, sparsity: float | None) -> Units:
    layers = problem.layers()
    modules = dict(problem.model.named_modules())
    num = {name: int(modules[name].weight.numel()) for name in layers}
    if problem.budget is not None:
        _undecided(layers)
        shared = budget_sparsity(problem, pruner, sum(num.values()))
        wanted = dict.fromkeys(layers, shared)
    else:
        wanted = {n: sparsity_of(pruner, n, sparsity, target) for n, target in layers.items()}
    keys = {name: parameter_name(name) for name in layers}
    return Units(
        names=list(layers),
        num={keys[name]: num[name] for name in layers},
        sparsity={keys[name]: wanted[name] for name in layers},
        step=dict.fromkeys(keys.values(), 1),
        min_kept=dict.fromkeys(keys.values(), 1),
    )


def _undecided(targets: Mapping[str, float | None]) -> None:
    fixed = [name for name, sparsity in targets.items() if sparsity is not None]
    if fixed:
        raise ConfigError(
            f"targets give {fixed[0]!r} a sparsity, and the job has a budget: "
            "they can't both decide"
        )


def check_sparsity(pruner: str, sparsity: float | None, name: str = "sparsity") -> None:
    """Raises a ConfigError for what is no fraction in [0, 1)."""
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ConfigError(f"{pruner}.{name} must be in [0, 1), got {sparsity:g}")


def sparsity_of(pruner: str, name: str, own: float | None, target: float | None) -> float:
    """What a target asks for, else what the pruner does."""
    sparsity = target if target is not None else own
    if sparsity is None:
        raise ConfigError(
            f"{pruner} needs a sparsity for {name!r}: give {pruner}.sparsity, "
            "targets.sparsity, or a budget"
        )
    return sparsity


def budget_sparsity(problem: Problem, pruner: str, prunable: int) -> float:
    """The one sparsity of all targeted layers' weights that meets a budget of parameters.

    Args:
        problem: Has the budget.
        pruner: Its name, for messages.
        prunable: Weights of the targeted layers.

    Raises:
        ConfigError: The budget limits something else.
        BudgetError: It can't be met.
    """
    layers = len(problem.layers())
    sparsity = (removable(problem, pruner, prunable) + layers) / prunable  # one for each floor
    if sparsity >= 1:
        total = sum(parameter.numel() for parameter in problem.model.parameters())
        least = total - prunable + layers
        raise BudgetError(
            f"budget {problem.budget} can't be reached: with one weight left in each of the "
            f"{layers} targeted layers the model keeps params {100 * least / total:.3g}%"
        )
    return sparsity


def removable(problem: Problem, pruner: str, prunable: int) -> int:
    """How many single weights must go to meet a budget of parameters.

    Args:
        problem: Has the budget.
        pruner: Its name, for messages.
        prunable: Weights that may go.

    Raises:
        ConfigError: The budget limits something else.
        BudgetError: It can't be met.
    """
    budget = problem.budget
    assert budget is not None
    if [name for name, _ in budget.limits] != ["params"]:
        raise ConfigError(
            f"{pruner} removes single weights, which saves parameters alone; "
            f"its budget can't be {budget}"
        )
    total = sum(parameter.numel() for parameter in problem.model.parameters())
    allowed = budget.limits[0][1].absolute(total)
    number = max(0, math.ceil(total - allowed))
    if number > prunable - len(problem.layers()):
        least = total - prunable + len(problem.layers())
        raise BudgetError(
            f"budget {budget} can't be reached: with one weight left in each of the "
            f"{len(problem.layers())} targeted layers the model keeps params "
            f"{100 * least / total:.3g}%"
        )
    return number
