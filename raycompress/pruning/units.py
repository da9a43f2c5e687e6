"""What a pruner removes, and how much of each in the end: the start of nearly every pruner.

Units are the channels of groups, or the single weights of layers, as the criterion has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raycompress.criteria import Criterion, parameter_name
from raycompress.errors import BudgetError, ConfigError
from raycompress.masks import num_kept
from raycompress.pruning.allocation import Competition
from raycompress.pruning.pruner import Problem, allocator
from raycompress.targets import Choice

__all__ = ["Units", "check_counts", "check_sparsity", "plan_units", "removable"]


@dataclass(frozen=True)
class Units:
    """How many units there are under each key of a ranking, and what is to stay.

    Attributes:
        names: Of groups or layers, as criteria take them.
        num: Units under each key.
        sparsity: Final fraction removed under each key; of a key in a pool, of the whole pool.
        step: Kept counts under a key are multiples of this.
        least: Fewest units under each key.
        pool: Keys of one pool compete for its sparsity; "" competes with nobody.
        choices: What targets ask, by key.
    """

    names: list[str]
    num: Mapping[str, int]
    sparsity: Mapping[str, float]
    step: Mapping[str, int]
    least: Mapping[str, int]
    pool: Mapping[str, str]
    choices: Mapping[str, Choice]

    def final(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Kept counts in the end.

        Args:
            scores: By key; only units that compete are looked at.
        """
        return self.kept(self.sparsity, scores)

    def share(self, fraction: float, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Kept counts with this fraction of each final sparsity."""
        return self.kept({key: s * fraction for key, s in self.sparsity.items()}, scores)

    def geometric(self, fraction: float, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Kept counts where the kept share is (1 - final sparsity) ** fraction."""
        shares = {key: 1 - (1 - s) ** fraction for key, s in self.sparsity.items()}
        return self.kept(shares, scores)

    def kept(self, sparsity: Mapping[str, float], scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Kept counts at a sparsity for each key; keys of a pool have one.

        Args:
            sparsity: Fraction removed.
            scores: By key; only units that compete are looked at.
        """
        counts = {
            key: num_kept(num, sparsity[key], round_to=self.step[key], min_kept=self.least[key])
            for key, num in self.num.items()
            if not self.pool[key]
        }
        for pool in sorted(set(self.pool.values()) - {""}):
            keys = [key for key in self.num if self.pool[key] == pool]
            total = sum(self.num[key] for key in keys)
            contest = Competition(
                {key: scores[key] for key in keys}, {key: self.least[key] for key in keys}
            )
            left = contest.counts(total - num_kept(total, sparsity[keys[0]]))
            counts |= self.rounded(left)
        return counts

    def rounded(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Kept counts rounded up to what they must be multiples of."""
        return {
            key: min(-(-count // self.step[key]) * self.step[key], self.num[key])
            for key, count in counts.items()
        }


def plan_units(
    problem: Problem,
    criterion: Criterion,
    pruner: str,
    sparsity: float | None,
    *,
    compete: bool = False,
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
        compete: All units are one pool. With a budget, their sparsity is left at 0: it is the
            pruner that knows how far to go.
        round_to: Kept counts of channels are multiples of this.
        min_kept: Fewest channels of a group.

    Raises:
        ConfigError: Nothing decides, or two things do.
        BudgetError: The budget can't be met.
    """
    channels = criterion.kind == "channels"
    choices = problem.groups() if channels else problem.layers()
    if channels:
        groups = {name: problem.structure.group(name) for name in choices}
        num = {name: group.num_channels for name, group in groups.items()}
        step = {name: math.lcm(round_to, group.multiple) for name, group in groups.items()}
        least = {name: max(min_kept, group.min_kept) for name, group in groups.items()}
        key_of = {name: name for name in choices}
    else:
        modules = dict(problem.model.named_modules())
        num = {name: int(modules[name].weight.numel()) for name in choices}
        step, least = dict.fromkeys(num, 1), dict.fromkeys(num, 1)
        key_of = {name: parameter_name(name) for name in choices}
    if not choices:
        what = "channel group that can be pruned" if channels else "layer with weights to prune"
        raise ConfigError(f"{pruner}: the model has no {what}")
    if problem.budget is not None or compete:
        _undecided(choices, pruner, problem.budget is not None)
    if problem.budget is not None and not compete:
        _uncontested(choices, pruner)
    if compete:
        if problem.budget is None and sparsity is None:
            raise ConfigError(f"{pruner} needs a sparsity: give {pruner}.sparsity, or a budget")
        wanted = dict.fromkeys(choices, sparsity if problem.budget is None else 0.0)
    elif problem.budget is None:
        wanted = {n: _sparsity_of(pruner, n, sparsity, c) for n, c in choices.items()}
    elif channels:
        fit = allocator(problem, list(choices), pruner, round_to, min_kept).fit
        kept = fit(dict.fromkeys(choices, 1.0))
        wanted = {name: 1 - kept[name] / num[name] for name in choices}
    else:
        wanted = dict.fromkeys(choices, budget_sparsity(problem, pruner, sum(num.values())))
    for name, choice in choices.items():
        capped = num[name] - int(num[name] * choice.max_sparsity + 1e-9)
        least[name] = min(max(least[name], capped), num[name])

    def keyed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key_of[name]: values[name] for name in choices}

    units = Units(
        names=list(choices),
        num=keyed(num),
        sparsity=keyed(wanted),
        step=keyed(step),
        least=keyed(least),
        pool=keyed({name: "all" if compete else choice.pool for name, choice in choices.items()}),
        choices=keyed(choices),
    )
    _check_caps(units)
    return units


def _uncontested(choices: Mapping[str, Choice], pruner: str) -> None:
    pooled = next((name for name, choice in choices.items() if choice.pool), None)
    if pooled is not None:
        raise ConfigError(
            f"targets let {pooled!r} compete with others, and the job has a budget, for which "
            f"{pruner} gives all the same sparsity: they can't both decide"
        )


def _check_caps(units: Units) -> None:
    """Raises a ConfigError for pools that `max_sparsity_per_layer` keeps from their sparsity."""
    for pool in set(units.pool.values()) - {""}:
        keys = [key for key in units.num if units.pool[key] == pool]
        if all(units.choices[key].max_sparsity == 1 for key in keys):
            continue
        total = sum(units.num[key] for key in keys)
        most = total - sum(units.least[key] for key in keys)
        wanted = units.sparsity[keys[0]]
        if int(total * wanted + 1e-9) > most:
            raise ConfigError(
                f"targets: with max_sparsity_per_layer at most {most / total:.3g} of the units of "
                f"{'all layers' if pool == 'all' else pool} can go, and {wanted:g} is asked for"
            )


def _undecided(choices: Mapping[str, Choice], pruner: str, budget: bool) -> None:
    fixed = [name for name, choice in choices.items() if choice.sparsity is not None]
    if fixed and budget:
        raise ConfigError(
            f"targets give {fixed[0]!r} a sparsity, and the job has a budget: "
            "they can't both decide"
        )
    if fixed:
        raise ConfigError(
            f"targets give {fixed[0]!r} a sparsity of its own, which {pruner}.scope 'global' "
            "is to find"
        )


def check_counts(pruner: str, round_to: int, min_kept: int) -> None:
    """Raises a ConfigError for kept counts that can't be."""
    for key, value in (("round_to", round_to), ("min_kept", min_kept)):
        if value < 1:
            raise ConfigError(f"{pruner}.{key} must be at least 1, got {value}")


def check_sparsity(pruner: str, sparsity: float | None, name: str = "sparsity") -> None:
    """Raises a ConfigError for what is no fraction in [0, 1)."""
    if sparsity is not None and not isinstance(sparsity, int | float):
        raise ConfigError(f"{pruner}.{name} must be a number, got {sparsity!r}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ConfigError(f"{pruner}.{name} must be in [0, 1), got {sparsity:g}")


def _sparsity_of(pruner: str, name: str, own: float | None, choice: Choice) -> float:
    """What a target asks for, else what the pruner does."""
    sparsity = own if choice.sparsity is None else choice.sparsity
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
            f"its budget can't be {budget}, which takes a pruner or criterion of channels"
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
