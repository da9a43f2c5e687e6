"""Loss against kept channels, for every group: an estimate of its shape, and a few measurements.

What a group loses with its channels, E(k) for k that stay, is known for every k from the scores
that rank them; OBS adds up the error that each removal leaves after reconstruction, which is a
second-order estimate. Losses follow it by a power, L = a * E^p, in which a and p are the group's
own: layers differ widely in how far their errors matter. Two measured widths give both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raycompress.candidate import Ranking

__all__ = ["Curves", "errors_of", "falling"]

FLOOR = 1e-4
"""Losses below this part of the largest can't be told from none."""

LEAST_EXPONENT = 0.5
"""Of what comes beyond the measured widths, where two of them lost the same."""


@dataclass(frozen=True)
class Curves:
    """What is known of every group.

    Attributes:
        ranking: In which order channels go.
        errors: For each group the estimates E(k) of k = 0, ..., C kept channels; falling, 0 at C.
        widths: For each group the measured kept counts, ascending; the last is C.
        losses: For each group the loss above the dense model's at these widths, at least 0 and
            falling; 0 at the last.
    """

    ranking: Ranking
    errors: Mapping[str, NDArray[np.float64]]
    widths: Mapping[str, tuple[int, ...]]
    losses: Mapping[str, tuple[float, ...]]

    def at(self, group: str, counts: Sequence[int]) -> NDArray[np.float64]:
        """Losses of a group at kept counts; they fall as counts rise.

        Between measured widths, and beyond, powers of the estimate: straight lines of their
        logarithms. One measured width gives the factor alone; for none it is the median of all.
        """
        errors = self.errors[group][list(counts)]
        known = self._known(group)
        found = np.zeros(len(errors))
        some = errors > 0
        if not known:
            found[some] = self._factor() * errors[some]
            return found
        x, y = (np.log(each) for each in np.array(known).T)
        steps = np.maximum(np.diff(x), 1e-9)
        exponents = np.diff(y) / steps if len(x) > 1 else np.ones(1)
        first, last = (max(float(exponents[i]), LEAST_EXPONENT) for i in (0, -1))
        at = np.log(errors[some])
        logs = np.interp(at, x, y)
        logs += np.minimum(at - x[0], 0) * first + np.maximum(at - x[-1], 0) * last
        found[some] = np.exp(logs)
        return found

    def _known(self, group: str) -> list[tuple[float, float]]:
        """(estimate, measured loss), rising."""
        floor = FLOOR * max(max(each) for each in self.losses.values())
        if floor == 0:
            return []
        pairs = zip(self.widths[group][:-1], self.losses[group][:-1], strict=True)
        return [(float(self.errors[group][w]), max(loss, floor)) for w, loss in pairs][::-1]

    def _factor(self) -> float:
        known = [loss / error for group in self.widths for error, loss in self._known(group)]
        return float(np.median(known)) if known else 1.0


def errors_of(scores: Tensor, cumulative: bool) -> NDArray[np.float64]:
    """Estimates E(k) for k = 0, ..., C kept channels, from scores of shape (C,).

    Args:
        scores: Of channels; the lowest go first.
        cumulative: Whether a score tells what all that went until then cost together; else they
            are added up, from the lowest on, as a share of them all.
    """
    rising = np.sort(scores.double().numpy())
    if not cumulative:
        rising = np.cumsum(rising - min(rising[0], 0.0))
        rising /= max(rising[-1], np.finfo(float).tiny)
    # Strictly, so that no removal is free: a channel of score 0 costs next to nothing.
    tiny = 1e-9 * max(rising[-1], 1e-9) * np.arange(1, len(rising) + 1)
    return np.append((np.maximum(rising, 0) + tiny)[::-1], 0.0)


def falling(values: Sequence[float]) -> tuple[float, ...]:
    """The non-increasing sequence nearest to the values in squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] < mean:
            before, num = blocks.pop()
            mean = (before * num + mean * size) / (num + size)
            size += num
        blocks.append((mean, size))
    return tuple(mean for mean, size in blocks for _ in range(size))
