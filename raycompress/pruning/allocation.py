"""One threshold over several keys' units: from scores to kept counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["Competition", "below_budget"]


class Competition:
    """Units of several keys, removed lowest score first, whosever they are.

    Ties go by key, then by index, so that the count is always exact. Each key keeps its highest
    scores up to its fewest units; the next in the order goes instead, so that no layer dies.

    Args:
        scores: For each key, higher = keep; -inf goes first.
        least: Fewest units that each key keeps.
    """

    def __init__(self, scores: Mapping[str, Tensor], least: Mapping[str, int]) -> None:
        self.names = list(scores)
        self._sizes = torch.tensor([scores[name].numel() for name in self.names])
        parts = []
        for name in self.names:
            flat = scores[name].detach().cpu().flatten().double().clone()
            safe = min(least[name], flat.numel())
            flat[flat.argsort(stable=True)[flat.numel() - safe :]] = torch.inf
            parts.append(flat)
        flat = torch.cat(parts)
        order = flat.argsort(stable=True)
        self.most = int((flat != torch.inf).sum())
        owner = torch.repeat_interleave(torch.arange(len(self.names)), self._sizes)
        self._order = owner[order]

    def counts(self, num_removed: int) -> dict[str, int]:
        """Kept counts after this many are removed, or as many as can be."""
        gone = self._order[: min(num_removed, self.most)]
        left = self._sizes - torch.bincount(gone, minlength=len(self.names))
        return dict(zip(self.names, left.tolist(), strict=True))


def below_budget(
    counts: Callable[[int], dict[str, int]], most: int, meets: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
    """The counts with the fewest units removed that meet a budget, by bisection.

    Args:
        counts: Kept counts for a number of removed units; none grows with that number.
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
