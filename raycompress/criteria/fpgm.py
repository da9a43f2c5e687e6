"""Redundancy of filters: those near the layer's geometric median can be replaced by the others.

He et al. 2019, arXiv 1811.00250 (FPGM), equation 5: g(F) = sum over j of ||F - F_j||_2.

Shapes: C filters of a layer, P weights in each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycompress.criteria.criterion import Criterion

__all__ = ["GeometricMedian"]

_ENTRIES = 1 << 24
"""Distances held at a time, in double precision: 128 MiB."""
_EXACT = 1 << 33
"""Up to so many differences (C * C * P) distances are summed difference by difference, so that
equal filters are at distance 0 and ties are exact; that takes some 20 s. Above, matrix products
are used, some 20 times as fast, with an error of 1e-8 of a filter's norm for near filters."""


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Criterion):
    """Sum of Euclidean distances to the other filters of the layer; the smallest go.

    Filters that are zero, as removed ones are, score 0 and don't count as the others' neighbours:
    they would pull the median to themselves.

    Deviation from the paper, which leaves coupled layers whole: coupled channels are ranked
    together, by the combined normalised sums of their layers.
    """

    def score(self, weight: Tensor) -> Tensor:
        """Sum of distances from each row of a (C, P) matrix to the rows that aren't zero."""
        alive = weight.any(dim=1)
        rows = weight[alive]
        scores = weight.new_zeros(len(weight))
        scores[alive] = _distance_sums(rows)
        return scores


def _distance_sums(rows: Tensor) -> Tensor:
    if len(rows) < 2:
        return rows.new_zeros(len(rows))
    exact = rows.shape[0] ** 2 * rows.shape[1] <= _EXACT
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
    sums = []
    for part in torch.split(rows, max(1, _ENTRIES // len(rows))):
        distances = torch.cdist(part, rows, compute_mode=mode)
        # In order of size, so that the sum doesn't depend on the order of the filters.
        sums.append(distances.sort(dim=1).values.sum(dim=1))
    return torch.cat(sums)
