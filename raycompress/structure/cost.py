"""Parameters, MACs and activation memory as functions of kept counts.

Convention: 1 MAC is one multiply-add of a convolution or matrix product (FLOPs = 2 MACs, as
`torch.utils.flop_counter` counts); elementwise work, norms and additions of a bias are not
counted. MACs and bytes are those of the traced pass divided by its batch size (the first dim of
the first input tensor), rounded down, hence of one example at the traced input size.
`activation_bytes` adds up every tensor that depends on the input and that an operator writes anew
(views are free): what training would have to hold, not the peak of inference.

Every size is linear in the kept counts, every cost a sum of products of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cost", "CostModel", "LayerCost"]

Ints = NDArray[np.int64]


class Cost(NamedTuple):
    """Cost of one example.

    Attributes:
        params: parameters, tied ones once.
        macs: multiply-adds.
        activation_bytes: bytes of all tensors written by the forward pass.
    """

    params: int
    macs: int
    activation_bytes: int


@dataclass(frozen=True)
class LayerCost:
    """One row of the table; `macs` for one example."""

    name: str
    type: str
    params: int
    macs: int


@dataclass(frozen=True, eq=False)
class CostModel:
    """Compiled sizes and terms.

    Attributes:
        index: group name -> position.
        full: channels of each group, shape (groups,).
        base: constant part of each size, shape (sizes,).
        slope: size for each kept channel, shape (sizes, groups).
        factors: sizes that each term multiplies, padded with a size that is 1, (terms, width).
        coefficients: shape (3, terms): what a term adds to params, MACs, bytes.
        batch: batch size of the traced pass.
        layers: names of the modules in the table.
        owner: position in `layers` of each table term, shape (table terms,).
        layer_factors: as `factors`, for the table.
        layer_coefficients: shape (2, table terms): params, MACs.
    """

    index: dict[str, int]
    full: Ints
    base: Ints
    slope: Ints
    factors: Ints
    coefficients: Ints
    batch: int
    layers: tuple[str, ...]
    owner: Ints
    layer_factors: Ints
    layer_coefficients: Ints

    def values(self, counts: Ints) -> Ints:
        """All sizes for the kept counts, shape (sizes,)."""
        sizes: Ints = self.base + self.slope @ counts
        return sizes

    def cost(self, counts: Ints) -> Cost:
        """Total cost for kept counts of shape (groups,)."""
        terms = self.values(counts)[self.factors].prod(axis=1)
        params, macs, size = self.coefficients @ terms
        return Cost(int(params), int(macs) // self.batch, int(size) // self.batch)

    def table(self, counts: Ints, types: dict[str, str]) -> list[LayerCost]:
        """Cost of each layer."""
        terms = self.values(counts)[self.layer_factors].prod(axis=1)
        amounts = self.layer_coefficients * terms
        params = np.zeros(len(self.layers), dtype=np.int64)
        macs = np.zeros(len(self.layers), dtype=np.int64)
        np.add.at(params, self.owner, amounts[0])
        np.add.at(macs, self.owner, amounts[1])
        return [
            LayerCost(name, types.get(name, ""), int(p), int(m) // self.batch)
            for name, p, m in zip(self.layers, params, macs, strict=True)
        ]
