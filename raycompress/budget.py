"""Budgets, and allocations that meet them by construction.

A budget says what may be *kept*: `{"macs": "50%"}` of the dense model, or an absolute number,
`{"params": 1_000_000}`; with several, all hold. Multiply-adds and parameters are exact, priced by
the structure; `latency_ms` is priced by a latency table, measured on the device beforehand.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from raycompress.errors import BudgetError, ConfigError
from raycompress.structure import ChannelGroup, Cost, Structure

__all__ = ["RESOURCES", "Allocator", "Budget", "Limit", "Pricing", "read_limit"]

RESOURCES = ("latency_ms", "macs", "params")


class Pricing(Protocol):
    """What latency budgets are counted with, such as a `structure.LatencyTable`."""

    def latency_ms(self, kept: Mapping[str, int] | None = None) -> float:
        """Milliseconds with `kept[group]` channels; groups left out stay whole."""


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
        limits: (resource, limit); resources are "latency_ms" (milliseconds of a forward pass at
            the batch size of its pricing), "macs" (multiply-adds of one example) and "params"
            (parameters).
    """

    limits: tuple[tuple[str, Limit], ...]

    @staticmethod
    def of(values: Mapping[str, str | int | float], key: str = "budget") -> Budget:
        """Reads a budget as users write it.

        Raises:
            ConfigError: An unknown resource, or a value outside of what it may be.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{key} must be a mapping such as {{'macs': '50%'}}, got {values!r}")
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
            limit = read_limit(value, f"{key}.{name}")
            if name != "latency_ms" and not limit.relative and limit.value <= 1:
                raise ConfigError(
                    f"{key}.{name} is a number of {name}, or a percentage kept: got {value!r}; "
                    f"write '{100 * limit.value:g}%' for that fraction"
                )
            limits.append((name, limit))
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

    @property
    def names_latency(self) -> bool:
        """Whether latency is limited, so that it takes a pricing to count with."""
        return any(name == "latency_ms" for name, _ in self.limits)

    def excess(
        self, cost: Cost, dense: Cost, latency_ms: tuple[float, float] | None = None
    ) -> float:
        """The largest ratio of a resource to its limit; at most 1 if the budget is met.

        Args:
            cost: Of what is judged.
            dense: Of the dense model.
            latency_ms: Of both, in this order; needed where latency is limited.
        """
        return max(self.ratios(cost, dense, latency_ms))

    def ratios(
        self, cost: Cost, dense: Cost, latency_ms: tuple[float, float] | None = None
    ) -> tuple[float, ...]:
        """For each limit, what is used of it; arguments as of `excess`."""
        return tuple(
            used / max(limit.absolute(whole), 1e-9)
            for limit, used, whole in self._amounts(cost, dense, latency_ms)
        )

    def kept(self, cost: Cost, dense: Cost, latency_ms: tuple[float, float] | None = None) -> str:
        """What is kept of each limited resource, in words: "macs 12.5%, latency_ms 40% (0.8)"."""
        parts = []
        amounts = self._amounts(cost, dense, latency_ms)
        for (name, limit), (_, used, whole) in zip(self.limits, amounts, strict=True):
            amount = "" if limit.relative else f" ({used:.4g})"
            parts.append(f"{name} {100 * used / max(whole, 1e-9):.3g}%{amount}")
        return ", ".join(parts)

    def _amounts(
        self, cost: Cost, dense: Cost, latency_ms: tuple[float, float] | None
    ) -> list[tuple[Limit, float, float]]:
        """For each limit: what is used, and of how much."""
        amounts = []
        for name, limit in self.limits:
            if name == "latency_ms":
                if latency_ms is None:
                    raise ValueError("a limit on latency_ms can't be judged without latencies")
                amounts.append((limit, *latency_ms))
            elif name == "macs":
                amounts.append((limit, float(cost.macs), float(dense.macs)))
            else:
                amounts.append((limit, float(cost.params), float(dense.params)))
        return amounts


def read_limit(value: str | int | float, key: str) -> Limit:
    """Reads a limit as users write it.

    Raises:
        ConfigError: It is none; the message starts with `key`.
    """
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
        most: Never more channels than this in a group, such as what a slim parent has; groups left
            out may stay whole.
        latency: Prices counts where the budget limits latency. More channels may cost less: what
            `fit` returns is within the budget all the same, but may not be the largest that is.

    Raises:
        ConfigError: The budget limits latency, and nothing prices it.
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
        most: Mapping[str, int] | None = None,
        latency: Pricing | None = None,
    ) -> None:
        if budget.names_latency and latency is None:
            raise ConfigError(
                f"budget {budget} needs a latency table, measured on the device "
                "(raycompress.structure.latency.table); none was given"
            )
        self.structure = structure
        self.groups = tuple(structure.group(name) for name in groups)
        self.budget = budget
        self.dense = structure.cost()
        self._latency = latency if budget.names_latency else None
        self._dense_ms = 0.0 if self._latency is None else self._latency.latency_ms()
        self._step = {g.name: _step(g, round_to) for g in self.groups}
        caps = {} if most is None else most
        self._most = {
            g.name: min(caps.get(g.name, g.num_channels), g.num_channels) for g in self.groups
        }
        self._least = {
            g.name: min(self._round(g, max(min_kept, g.min_kept), up=True), self._most[g.name])
            for g in self.groups
        }
        self._base = self._smallest()
        if not self.meets(self._base):
            least = self._base == self._least
            how = "the fewest channels" if least else "the fastest uniform widths"
            kept = budget.kept(structure.cost(self._base), self.dense, self._ms(self._base))
            raise BudgetError(
                f"budget {budget} can't be reached: with {how} in all "
                f"{len(self.groups)} prunable groups the model keeps {kept}; "
                "raise the budget, or allow more layers to be pruned"
            )

    def _smallest(self) -> dict[str, int]:
        """The fewest channels; or, where more take less time, the fastest uniform allocation."""
        if self._latency is None or self.meets(self._least):
            return self._least
        uniform = dict.fromkeys(self._least, 1.0)
        return min((self._counts(uniform, i / 64) for i in range(65)), key=self.excess)

    def excess(self, counts: Mapping[str, int]) -> float:
        """The largest ratio of a resource to its limit; at most 1 if the budget is met."""
        return max(self.ratios(counts))

    def ratios(self, counts: Mapping[str, int]) -> tuple[float, ...]:
        """For each of the budget's limits, what is used of it."""
        return self.budget.ratios(self.structure.cost(counts), self.dense, self._ms(counts))

    def sizes(self, group: str) -> range:
        """Kept counts that a group may have, the most that it may have left out."""
        return range(self._least[group], self._most[group], self._step[group])

    def meets(self, counts: Mapping[str, int]) -> bool:
        """Whether counts are within the budget."""
        return self.excess(counts) <= 1

    def _ms(self, counts: Mapping[str, int]) -> tuple[float, float] | None:
        if self._latency is None:
            return None
        return self._latency.latency_ms(counts), self._dense_ms

    def fit(self, fractions: Mapping[str, float]) -> dict[str, int]:
        """The largest allocation in the direction of the fractions that meets the budget.

        All fractions are scaled by one factor, each capped at 1 and at the fewest channels; the
        factor is the largest that meets the budget (bisection: cost grows with it; where latency
        doesn't, it ends at one of the factors at which the budget stops being met). What rounding
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
        counts = self._counts(fractions, low)
        if not low and not self.meets(counts):  # more channels than the fewest take less time
            counts = self._base
        return self._fill(counts, lambda g: fractions[g.name] * high)

    def fill(self, counts: dict[str, int]) -> dict[str, int]:
        """Gives out what an allocation leaves of the budget, channel by channel."""
        whole = {g.name: counts[g.name] / g.num_channels for g in self.groups}
        return self._fill(counts, lambda g: whole[g.name])

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
                if more <= self._most[group.name] and self.meets(larger):
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
        if wanted >= self._most[group.name]:
            return self._most[group.name]
        step = self._step[group.name]
        whole = int((wanted + 1e-9) // step) * step
        return whole + step if up and whole < wanted else whole


def _step(group: ChannelGroup, round_to: int) -> int:
    step = max(round_to, 1)
    while step % group.multiple:
        step += max(round_to, 1)
    return min(step, group.num_channels)
