"""Magnitude: small weights and filters with small norms matter least.

Han et al. 2015 (single weights); Li et al. 2017, arXiv 1608.08710 (L1 norm of filters).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from raycompress.criteria.criterion import Criterion

__all__ = ["L1", "L2", "Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """|w| of every single weight."""

    kind: ClassVar[Literal["channels", "weights"]] = "weights"

    def score(self, weight: Tensor) -> Tensor:
        """|w|, of the shape of `weight`."""
        return weight.abs()


@dataclass(frozen=True, kw_only=True)
class L1(Criterion):
    """Sum of |w| over a filter (arXiv 1608.08710, section 3.1)."""

    def score(self, weight: Tensor) -> Tensor:
        """Sum of absolute values of each row of a (C, P) matrix."""
        return weight.abs().sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class L2(Criterion):
    """Euclidean norm of a filter."""

    def score(self, weight: Tensor) -> Tensor:
        """Root of the sum of squares of each row of a (C, P) matrix."""
        return weight.square().sum(dim=1).sqrt()
