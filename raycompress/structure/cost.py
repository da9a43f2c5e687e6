"""Parameters, MACs and activation memory as functions of kept counts.

Convention: 1 MAC is one multiply-add of a convolution or matrix product (FLOPs = 2 MACs, as
`torch.utils.flop_counter` counts); elementwise work, norms and additions of a bias are not
counted. MACs and bytes are those of the traced pass divided by its batch size (the first dim of
the first input tensor), rounded down, hence of one example at the traced input size.
`activation_bytes` adds up every tensor that depends on the input and that an operator writes anew
(views are free): what training would have to hold, not the peak of inference. A tensor that the
traced pass copied counts as copied, also where so few channels are kept that `reshape` needn't.

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
    """One row of the table: what a module itself holds and computes, without its children.

    Attributes:
        name: of the module.
        type: its class name.
        params: parameters, tied ones at their first name.
        macs: multiply-adds for one example.
        activation_bytes: bytes that its operators write for one example.
        output: shape of the first tensor that it returned, with the traced batch size; () if none.
    """

    name: str
    type: str
    params: int
    macs: int
    activation_bytes: int
    output: tuple[int, ...]


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
        outputs: for each of them that returned a tensor, the size of each of its dims.
        owner: position in `layers` of each table term, shape (table terms,).
        layer_factors: as `factors`, for the table.
        layer_coefficients: shape (3, table terms): params, MACs, bytes.
    """

    index: dict[str, int]
    full: Ints
    base: Ints
    slope: Ints
    factors: Ints
    coefficients: Ints
    batch: int
    layers: tuple[str, ...]
    outputs: dict[str, tuple[int, ...]]
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
        values = self.values(counts)
        amounts = self.layer_coefficients * values[self.layer_factors].prod(axis=1)
        totals = np.zeros((len(self.layers), 3), dtype=np.int64)
        np.add.at(totals, self.owner, amounts.T)
        return [
            LayerCost(
                name,
                types.get(name, ""),
                int(params),
                int(macs) // self.batch,
                int(size) // self.batch,
                tuple(int(values[d]) for d in self.outputs.get(name, ())),
            )
            for name, (params, macs, size) in zip(self.layers, totals, strict=True)
        ]
