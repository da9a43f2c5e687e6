"""Optimal Brain Surgeon for whole channels: those go first that the layers reading them miss least.

Hassibi & Stork 1993 (one weight at a time); blocks of weights as in OBC, Frantar & Alistarh 2022,
arXiv 2208.11580. With X the inputs of a layer that reads the channels, W its weights and

    H = X^T X + damping * mean(diag X^T X) * I,

what channel c costs if the weights W_c that read it go and all others are solved again is

    tr(W_c^T ([H^-1]_cc)^-1 W_c),

and afterwards W -= H^-1[:, c] ([H^-1]_cc)^-1 W_c and H^-1 -= H^-1[:, c] ([H^-1]_cc)^-1 H^-1[c, :].
The cheapest goes, again and again. `reconstruction` installs these least-squares weights.

Shapes: C channels of a group, B inputs of a layer for each channel (places of the kernel, or
columns that it owns after a flatten), I inputs of a layer times kernel places (and 1 for a bias),
O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycompress.errors import EvaluationError

__all__ = ["Reader", "removal_order"]

TIE = 1e-10
"""Channels whose costs differ by less, as a fraction of a layer's squared answers, go by index, so
that rounding doesn't decide."""


@dataclass(frozen=True, eq=False)
class Reader:
    """What was seen of a layer that reads a group's channels.

    Attributes:
        gram: X^T X, shape (I, I), double.
        weight: W, shape (I, O), double.
        blocks: Rows of W that read each channel, shape (C, B); rows in no block, such as a bias,
            are never removed.
        square: ||XW||^2; costs are divided by it.
    """

    gram: Tensor
    weight: Tensor
    blocks: Tensor
    square: float


def removal_order(readers: Sequence[Reader], damping: float) -> tuple[Tensor, Tensor]:
    """Removes all channels, the cheapest first.

    Args:
        readers: Layers that read the channels; their costs add up.
        damping: See `OBS`.

    Returns:
        Channels in the order of removal, and what each cost when it went, shape (C,) each.

    Raises:
        EvaluationError: Rounding made a matrix singular.
    """
    layers = [_Live(reader, damping) for reader in readers]
    count = len(readers[0].blocks)
    ids = torch.arange(count, device=readers[0].gram.device)
    order, costs = [], []
    for live in range(count, 0, -1):
        each = torch.stack([layer.costs() for layer in layers]).sum(dim=0)
        # Ties by index; `ids` isn't sorted.
        at = int(torch.where(each <= each.min() + TIE, ids[:live], count).argmin())
        order.append(int(ids[at]))
        costs.append(float(each[at]))
        ids[at] = ids[live - 1].clone()
        for layer in layers:
            layer.remove(at)
    return torch.tensor(order), torch.tensor(costs, dtype=torch.float64)


class _Live:
    """H^-1 and W of the channels that a layer still reads.

    What is never removed needs no rows here: it had its part in the inverse.
    """

    def __init__(self, reader: Reader, damping: float) -> None:
        columns = reader.blocks.flatten().to(reader.gram.device)
        self._inverse = _inverse(reader.gram, damping)[columns[:, None], columns]
        self._weight = reader.weight[columns]
        # Of inputs that are always zero: any will do.
        self._weight[reader.gram.diagonal()[columns] == 0] = 0
        self._size = reader.blocks.shape[1]
        self._square = max(reader.square, 1e-300)

    def costs(self) -> Tensor:
        """What the removal of each live channel costs, shape (live,)."""
        size = self._size
        live = len(self._weight) // size
        blocks = self._inverse.view(live, size, live, size).diagonal(dim1=0, dim2=2)
        factors = _cholesky(blocks.permute(2, 0, 1))
        weights = self._weight.view(live, size, -1)
        solved: Tensor = torch.linalg.solve_triangular(factors, weights, upper=False)
        return solved.square().sum(dim=(1, 2)) / self._square

    def remove(self, at: int) -> None:
        """Removes a channel; the last one takes its place."""
        inverse, weight, size = self._inverse, self._weight, self._size
        own = slice(at * size, (at + 1) * size)
        columns = inverse[:, own].clone()
        factor = _cholesky(columns[own])
        change = torch.cholesky_solve(weight[own], factor)
        weight.addmm_(columns, change, alpha=-1)
        inverse.addmm_(columns, torch.cholesky_solve(columns.T, factor), alpha=-1)
        rest = len(inverse) - size
        last = slice(rest, len(inverse))
        weight[own] = weight[last].clone()
        inverse[own] = inverse[last].clone()
        inverse[:, own] = inverse[:, last].clone()
        self._inverse, self._weight = inverse[:rest, :rest], weight[:rest]


def _inverse(gram: Tensor, damping: float) -> Tensor:
    """H^-1."""
    mean = float(gram.diagonal().mean())
    matrix = gram.clone()
    matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return torch.cholesky_inverse(_cholesky(matrix))


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise EvaluationError("'obs': a matrix became singular; raise OBS.damping")
    return factor
