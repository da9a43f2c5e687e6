"""Patterns of single weights: which of them compete with each other.

A pattern turns scores into the order in which weights go; then any prefix of the order that ends
at a full step follows the pattern exactly.

Shapes: a weight is (O, I, *K); in transposed convolutions (I, O, *K).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from raycompress.errors import ConfigError

__all__ = ["Pattern", "pattern_of"]


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    Attributes:
        kind: "none": all weights of a layer compete; "row": those of one output; "n:m": each m
            consecutive inputs of one output and kernel position; "block": blocks of outputs by
            inputs, all their kernel positions included, go whole.
        first: n, or the height of a block in outputs.
        second: m, or its width in inputs.
    """

    kind: str
    first: int = 0
    second: int = 0

    @property
    def sparsity(self) -> float | None:
        """The sparsity that an n:m pattern has; None where it is free."""
        return 1 - self.first / self.second if self.kind == "n:m" else None

    def fits(self, module: nn.Module) -> bool:
        """Whether a layer's inputs can be cut into groups of m; other patterns fit all."""
        return (
            self.kind != "n:m"
            or inputs_last(module, _weight(module)).shape[-1] % (self.second) == 0
        )

    def arrange(self, module: nn.Module, scores: Tensor) -> Tensor:
        """Scores whose plain ascending order is the order of removal, of the shape of `scores`."""
        if self.kind == "none":
            return scores
        index = torch.arange(scores.numel()).view_as(scores)
        rows, places = (inputs_last(module, t).double() for t in (scores, index))
        if self.kind == "block":
            key = self._blocks(rows)
        else:
            width = self.second if self.kind == "n:m" else rows[0].numel()
            grouped = rows.reshape(-1, width)
            # Rank inside of its group, 0 for the lowest; so each round takes one from each group.
            ranks = grouped.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
            key = ranks.reshape(rows.shape)
        order = _lexsort(key.flatten(), rows.flatten())
        result = torch.empty(scores.numel(), dtype=torch.float64)
        result[places.flatten().long()[order]] = torch.arange(scores.numel(), dtype=torch.float64)
        return result.view_as(scores)

    def num_removed(self, module: nn.Module, scores: Tensor, sparsity: float) -> int:
        """Weights that go at a sparsity: floor of it in each group, or so many whole blocks."""
        rows = inputs_last(module, scores).double()
        if self.kind == "row":
            return rows.shape[0] * int(rows[0].numel() * sparsity + 1e-9)
        if self.kind == "n:m":
            return rows.numel() // self.second * (self.second - self.first)
        if self.kind == "none":
            return int(rows.numel() * sparsity + 1e-9)
        ids = self._block_ids(rows)
        sizes = torch.bincount(ids)
        totals = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, ids, rows.flatten())
        gone = int(len(sizes) * sparsity + 1e-9)
        return int(sizes[totals.argsort(stable=True)[:gone]].sum())

    def _block_ids(self, rows: Tensor) -> Tensor:
        outputs, inputs = rows.shape[0], rows.shape[-1]
        across = math.ceil(inputs / self.second)
        high = (torch.arange(outputs) // self.first).reshape(-1, *[1] * (rows.dim() - 1))
        wide = torch.arange(inputs) // self.second
        return (high * across + wide).expand(rows.shape).flatten()

    def _blocks(self, rows: Tensor) -> Tensor:
        """Rank of each entry's block, lowest sum first."""
        ids = self._block_ids(rows)
        totals = torch.zeros(int(ids.max()) + 1, dtype=torch.float64)
        totals.index_add_(0, ids, rows.flatten())
        ranks = totals.argsort(stable=True).argsort()
        return ranks[ids].reshape(rows.shape)


def pattern_of(text: str, key: str) -> Pattern:
    """Parses "" (none), "row", "2:4" or "block 4x4".

    Raises:
        ConfigError: It is something else.
    """
    if text == "":
        return Pattern("none")
    if text == "row":
        return Pattern("row")
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(found[1]), int(found[2])
        if 0 < n < m:
            return Pattern("n:m", n, m)
    if found := re.fullmatch(r"block (\d+)x(\d+)", text):
        high, wide = int(found[1]), int(found[2])
        if high > 0 and wide > 0:
            return Pattern("block", high, wide)
    raise ConfigError(
        f"{key} must be '', 'row', 'n:m' with 0 < n < m such as '2:4', or 'block HxW' such as "
        f"'block 4x4', got {text!r}"
    )


def inputs_last(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or anything of its shape, as (O, *K, I)."""
    if isinstance(module, _ConvTransposeNd):
        weight = weight.transpose(0, 1)
    return weight.movedim(1, -1) if weight.dim() > 2 else weight


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _lexsort(first: Tensor, second: Tensor) -> Tensor:
    """Indices that sort by `first`, then by `second`, then by place."""
    by_second = second.argsort(stable=True)
    return by_second[first[by_second].argsort(stable=True)]
