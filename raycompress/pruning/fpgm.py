"""FPGM (He et al. 2019, arXiv 1811.00250): filters that the layer's others can replace go."""

from __future__ import annotations

from dataclasses import dataclass

from raycompress.criteria import Criterion, GeometricMedian
from raycompress.pruning.one_shot import ChannelPruner

__all__ = ["FPGM"]


@dataclass(frozen=True, kw_only=True)
class FPGM(ChannelPruner):
    """Removes the channels whose filters are nearest to all others of their layer.

    Unlike a small norm, a small distance says that a filter is redundant: the ranking doesn't
    change if the same tensor is added to all filters of a layer.

    Deviation from the paper: pruning is one-shot. `SoftFilter` with this criterion trains as the
    paper does: filters are zeroed after each epoch, and may grow back.
    """

    def scorer(self) -> Criterion:
        """Sums of Euclidean distances."""
        return GeometricMedian()
