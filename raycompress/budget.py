"""Budgets, and allocations that meet them by construction.

A budget says what may be *kept*: `{"macs": "50%"}` of the dense model, or an absolute number,
`{"params": 1_000_000}`; with several, all hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raycompress.errors import BudgetError, ConfigError
from raycompress.structure import ChannelGroup, Cost, Structure

__all__ = ["RESOURCES", "Allocator", "Budget", "Limit"]

RESOURCES = ("macs", "params")


@dataclass(frozen=True)
class Limit:
    """What may be kept of one resource: a fraction of the dense model's, or a number."""

    value: float
    relative: bool

    def absolute(self, dense: float) -> float:
        """In the resource's own unit."""
        return self.value * dense if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value * 100:g}%" if self.relative else f"{self.value:g}"


@dataclass(frozen=True)
class Budget:
    """Limits by resource, sorted by name.

    Attributes:
        limits: (resource, limit); resources are "macs" (multiply-adds of one example) and
            "params" (parameters).
    """

    limits: tuple[tuple[str, Limit], ...]

    @staticmethod
    def of(values: Mapping[str, str | int | float], key: str = "budget") -> Budget:
        """Reads a budget as users write it.

        Raises:
            ConfigError: An unknown resource, or a value outside of what it may be.
        """
        if not values:
            raise ConfigError(f"{key} must name a resource, one of {', '.join(RESOURCES)}")
        limits = []
        for name, value in sorted(values.items()):
            if name not in RESOURCES:
                near = difflib.get_close_matches(name, RESOURCES, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"{key}.{name} is no resource; allowed: {', '.join(RESOURCES)}{hint}"
                )
            limits.append((name, _limit(value, f"{key}.{name}")))
        return Budget(tuple(limits))

    def __str__(self) -> str:
        return ", ".join(f"{name} {limit}" for name, limit in self.limits)

    @property
    def label(self) -> str:
        """A name fit for files, such as "macs50"."""
        return "-".join(
            f"{name}{limit.value * 100:g}" if limit.relative else f"{name}{limit.value:g}abs"
            for name, limit in self.limits
        )

    def excess(self, cost: Cost, dense: Cost) -> float:
        """The largest ratio of a resource to its limit; at most 1 if the budget is met."""
        return max(
            _resource(cost, name) / max(limit.absolute(_resource(dense, name)), 1e-9)
            for name, limit in self.limits
        )

    def fraction(self, dense: Cost) -> float:
        """The tightest limit as a fraction of the dense model."""
        return min(
            limit.absolute(_resource(dense, name)) / max(_resource(dense, name), 1)
            for name, limit in self.limits
        )


def _resource(cost: Cost, name: str) -> float:
    return float(cost.macs if name == "macs" else cost.params)


def _limit(value: str | int | float, key: str) -> Limit:
    allowed = "a percentage kept such as 50%, above 0% and at most 100%, or a number above 0"
    if isinstance(value, str):
        text = value.strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            raise ConfigError(f"{key} must be {allowed}, got {value!r}") from None
        limit = Limit(number / 100, True) if text.endswith("%") else Limit(number, False)
    else:
        limit = Limit(float(value), False)
    if not 0 < limit.value or (limit.relative and limit.value > 1):
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")
    return limit


class Allocator:
    """Kept counts that meet a budget, made from keep fractions without trial and error.

    Args:
        structure: Prices counts.
        groups: Names of the groups that may lose channels.
        budget: What may be kept.
        round_to: Kept counts are multiples of this, where a group's own constraint allows it.
        min_kept: Never fewer channels than this in a group.

    Raises:
        BudgetError: Even the smallest allocation exceeds the budget.
    """

    def __init__(
        self,
        structure: Structure,
        groups: tuple[str, ...],
        budget: Budget,
        *,
        round_to: int = 1,
        min_kept: int = 1,
    ) -> None:
        self.structure = structure
        self.groups = tuple(structure.group(name) for name in groups)
        self.budget = budget
        self.dense = structure.cost()
        self._step = {g.name: _step(g, round_to) for g in self.groups}
        self._least = {
            g.name: min(self._round(g, max(min_kept, g.min_kept), up=True), g.num_channels)
            for g in self.groups
        }
        smallest = structure.cost(self._least)
        if budget.excess(smallest, self.dense) > 1:
            lowest = ", ".join(
                f"{name} {100 * _resource(smallest, name) / _resource(self.dense, name):.3g}%"
                for name, _ in budget.limits
            )
            raise BudgetError(
                f"budget {budget} can't be reached: with the fewest channels in all "
                f"{len(self.groups)} prunable groups the model keeps {lowest}; "
                "raise the budget, or allow more layers to be pruned"
            )

    def meets(self, counts: Mapping[str, int]) -> bool:
        """Whether counts are within the budget."""
        return self.budget.excess(self.structure.cost(counts), self.dense) <= 1

    def fit(self, fractions: Mapping[str, float]) -> dict[str, int]:
        """The largest allocation in the direction of the fractions that meets the budget.

        All fractions are scaled by one factor, each capped at 1 and at the fewest channels; the
        factor is the largest that meets the budget (bisection: cost grows with it). What rounding
        leaves is then given out channel by channel, to whoever lies furthest below its share.

        Args:
            fractions: Keep fraction wanted for each group, above 0; absolute size is irrelevant.

        Returns:
            Kept count for each group.
        """
        low, high = 0.0, 1.0 / max(min(fractions.values()), 1e-6)
        if self.meets(self._counts(fractions, high)):
            return self._counts(fractions, high)
        for _ in range(40):
            middle = (low + high) / 2
            if self.meets(self._counts(fractions, middle)):
                low = middle
            else:
                high = middle
        return self._fill(self._counts(fractions, low), lambda g: fractions[g.name] * high)

    def _fill(
        self, counts: dict[str, int], share: Callable[[ChannelGroup], float]
    ) -> dict[str, int]:
        grown = True
        while grown:  # each pass adds a channel or ends, so this does
            grown = False
            order = sorted(
                self.groups, key=lambda g: counts[g.name] / g.num_channels - min(1.0, share(g))
            )
            for group in order:
                more = counts[group.name] + self._step[group.name]
                larger = {**counts, group.name: more}
                if more <= group.num_channels and self.meets(larger):
                    counts, grown = larger, True
        return counts

    def _counts(self, fractions: Mapping[str, float], scale: float) -> dict[str, int]:
        counts = {}
        for group in self.groups:
            wanted = min(1.0, fractions[group.name] * scale) * group.num_channels
            least = self._least[group.name]
            counts[group.name] = max(self._round(group, wanted, up=False), least)
        return counts

    def _round(self, group: ChannelGroup, wanted: float, *, up: bool) -> int:
        if wanted >= group.num_channels:
            return group.num_channels
        step = self._step[group.name]
        whole = int((wanted + 1e-9) // step) * step
        return whole + step if up and whole < wanted else whole


def _step(group: ChannelGroup, round_to: int) -> int:
    step = max(round_to, 1)
    while step % group.multiple:
        step += max(round_to, 1)
    return min(step, group.num_channels)
