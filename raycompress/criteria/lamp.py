"""Layer-adaptive magnitude (Lee et al. 2021, arXiv 2010.07611, equation 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raycompress.criteria.criterion import Criterion

__all__ = ["LAMP"]


@dataclass(frozen=True, kw_only=True)
class LAMP(Criterion):
    """w^2 over the sum of the squares of all weights of the layer that are at least as large.

    The largest weight of a layer scores 1, so no layer dies under one global threshold; inside of
    a layer the order is that of magnitude. Of equal weights, the first in the order of removal
    has the others in its sum.
    """

    kind: ClassVar[Literal["channels", "weights"]] = "weights"

    def score(self, weight: Tensor) -> Tensor:
        """Scores in [0, 1], of the shape of `weight`."""
        squares = weight.double().flatten().square()
        order = squares.argsort(stable=True)
        ascending = squares[order]
        # Sums from the top, so that small weights' scores aren't lost to cancellation.
        left = ascending.flip(0).cumsum(0).flip(0)
        scores = torch.empty_like(squares)
        scores[order] = ascending / left.clamp_min(torch.finfo(torch.float64).tiny)
        return scores.view(weight.shape)
