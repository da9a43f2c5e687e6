"""From scores of channels to kept counts: one threshold over all groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from raycompress.structure import ChannelGroup

__all__ = ["below_budget", "globally", "order_of_removal"]


def order_of_removal(scores: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """Group of each channel in the order in which a falling threshold removes them.

    Ties go by group, in the order of `names`, then by index; so the count is always exact.
    """
    flat = torch.cat([scores[name].flatten().double() for name in names])
    owner = torch.cat([torch.full((scores[name].numel(),), i) for i, name in enumerate(names)])
    return [names[i] for i in owner[torch.argsort(flat, stable=True)].tolist()]


def globally(
    order: Sequence[str],
    groups: Mapping[str, ChannelGroup],
    num_removed: int,
    *,
    round_to: int = 1,
    min_kept: int = 1,
) -> dict[str, int]:
    """Kept counts after the first channels of a global order are removed.

    A group that is down to its fewest channels is passed over, and the next channel in the order
    goes in its place; so no layer dies, and the number removed is exact where that many can go.
    Kept counts are rounded up to `round_to` at the end, which removes fewer.

    Args:
        order: Of `order_of_removal`.
        groups: By name.
        num_removed: How many channels go.
        round_to: Kept counts are multiples of this, and of the group's own `multiple`.
        min_kept: Never fewer in a group.
    """
    counts = {name: group.num_channels for name, group in groups.items()}
    least = {
        name: min(max(min_kept, group.min_kept), group.num_channels)
        for name, group in groups.items()
    }
    left = num_removed
    for name in order:
        if not left:
            break
        if counts[name] > least[name]:
            counts[name] -= 1
            left -= 1
    return {name: _rounded(count, groups[name], round_to) for name, count in counts.items()}


def _rounded(count: int, group: ChannelGroup, round_to: int) -> int:
    step = math.lcm(round_to, group.multiple)
    return min(-(-count // step) * step, group.num_channels)


def below_budget(
    counts: Callable[[int], dict[str, int]], most: int, meets: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
    """The counts with the fewest channels removed that meet a budget, by bisection.

    Args:
        counts: Kept counts for a number of removed channels; none grows with that number.
        most: The largest number that can be removed, which meets the budget.
        meets: Whether counts are within the budget.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if meets(counts(middle)):
            high = middle
        else:
            low = middle + 1
    return counts(high)
