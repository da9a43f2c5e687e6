"""Label tensors: which prunable channel does each element of a tensor belong to?

A *facet* is an int64 tensor of label ids with as many dims as the tensor that it describes. Its
size is 1 along every dim where the label doesn't change, so that all costs are O(channels), never
O(elements). `V(f)` is the set of dims along which a facet varies. A tensor carries a list of
facets, one for each independent family of axes. An element is gone if the label of any of its
facets is gone. Label 0 means "not prunable".

Uniting is lazy: edges are collected here, and `closure.py` turns them into classes at the end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Conjunction",
    "Facets",
    "LabelSpace",
    "apart",
    "canonical",
    "move",
    "run_length",
    "spread",
    "varying",
]

Facets = list[Tensor]
Ids = NDArray[np.int64]
_ODD = np.int64(0x1E3779B97F4A7C15)


def varying(facet: Tensor) -> tuple[int, ...]:
    """Dims along which the label changes."""
    return tuple(d for d, size in enumerate(facet.shape) if size > 1)


def spread(facet: Tensor, shape: Sequence[int]) -> Tensor:
    """The facet with the full shape of its tensor (stride 0 where it doesn't vary)."""
    return facet.expand(tuple(shape))


def canonical(labels: Tensor) -> Tensor | None:
    """Drops the dims along which labels don't change; None if nothing is left that varies."""
    if labels.numel() == 0:
        return None
    for dim, size in enumerate(labels.shape):
        if size == 1:
            continue
        first = labels.narrow(dim, 0, 1)
        if labels.stride(dim) == 0:
            labels = first
        elif torch.equal(labels.select(dim, 0), labels.select(dim, size - 1)) and bool(
            (labels == first).all()
        ):
            labels = first
    return labels.contiguous() if varying(labels) else None


def move(facets: Facets, shape: Sequence[int], function: Callable[[Tensor], Tensor]) -> Facets:
    """Runs a data movement on the labels of a tensor of the given shape."""
    moved = (canonical(function(spread(f, shape))) for f in facets)
    return [f for f in moved if f is not None]


def _distinct_rows(rows: Ids) -> tuple[Ids, Ids]:
    """Places of the distinct rows, and for each row which of them it is."""
    # Sums with odd weights tell rows apart much faster than sorting whole rows.
    weights = (np.arange(rows.shape[1], dtype=np.int64) * 2 + 1) * _ODD
    _, first, again = np.unique(
        (rows * weights).sum(axis=1), return_index=True, return_inverse=True
    )
    if not np.array_equal(rows[first[again]], rows):  # two rows with one sum
        _, first, again = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, again.reshape(-1)


def apart(shape: Sequence[int], facets: Facets) -> tuple[tuple[int, ...], Facets]:
    """The shape with two axes that were flattened into one dim as dims of their own.

    Sizes are then products of what each axis keeps.
    """
    sizes = tuple(shape)
    for dim in range(len(sizes) - 1, -1, -1):
        here = [f for f in facets if varying(f) == (dim,)]
        if len(here) != 2:
            continue
        lines = [f.reshape(-1) for f in here]
        run = max(run_length(line) for line in lines)
        if run == 1 or sizes[dim] % run:
            continue
        rows = [line.reshape(-1, run) for line in lines]
        outer = [bool((r == r[:, :1]).all()) for r in rows]
        inner = [bool((r == r[:1]).all()) for r in rows]
        if not (outer[0] and inner[1]) and not (outer[1] and inner[0]):
            continue
        sizes = (*sizes[:dim], sizes[dim] // run, run, *sizes[dim + 1 :])
        split = []
        for f in facets:
            cut = (1, 1) if f.shape[dim] == 1 else (-1, run)
            whole = f.reshape(*f.shape[:dim], *cut, *f.shape[dim + 1 :])
            small = canonical(whole)
            split.append(whole if small is None else small)
        facets = split
    return sizes, facets


def run_length(facet: Tensor) -> int:
    """How long the first label is repeated: long for an outer axis."""
    line = facet.reshape(-1)
    return int((line == line[0]).long().cumprod(0).sum())


@dataclass(frozen=True)
class Conjunction:
    """Labels that are gone if and only if all their children are.

    Attributes:
        ids: shape (n,).
        children: shape (n, m).
        inner: the dims reduced lie behind the dims that remain, as head_dim lies behind heads.
    """

    ids: Ids
    children: Ids
    inner: bool


@dataclass
class LabelSpace:
    """All label ids of one traced forward pass, and what is known about them.

    Attributes:
        count: number of ids given so far; id 0 is "not prunable".
        edges: pairs of id arrays that must go together.
        conjunctions: see `Conjunction`.
        rectangles: label arrays of tensors that must stay rectangular.
        parts: (labels, dim, part size): the dim is cut into equal parts, which must stay equal.
        fixed: (labels, dim, reason): nothing may be removed along this dim.
        frozen: ids that can't be removed, with the reason.
        inexact: ids whose removal changes what is computed, with the reason.
        flexible: (first id, one past the last) of labels of constants, see `constant_facets`.
    """

    count: int = 1
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    conjunctions: list[Conjunction] = field(default_factory=list)
    rectangles: list[Ids] = field(default_factory=list)
    parts: list[tuple[Ids, int, int]] = field(default_factory=list)
    fixed: list[tuple[Ids, int, str]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    inexact: list[tuple[Ids, str]] = field(default_factory=list)
    flexible: list[tuple[int, int]] = field(default_factory=list)
    _known: dict[bytes, Ids] = field(default_factory=dict)

    def fresh(self, number: int) -> Tensor:
        """New ids, shape (number,)."""
        ids = torch.arange(self.count, self.count + number)
        self.count += number
        return ids

    def constant_facets(self, shape: Sequence[int], dims: Sequence[int]) -> Facets:
        """Facets along dims where a tensor repeats one value: it can take any size.

        Its size comes from another tensor or an attribute, so it follows the channels that it
        meets. Where the code has the number written into it, the slim model stops.
        """
        facets = []
        for dim in dims:
            if shape[dim] > 1:
                start = self.count
                line = [shape[dim] if d == dim else 1 for d in range(len(shape))]
                facets.append(self.fresh(shape[dim]).reshape(line))
                self.flexible.append((start, self.count))
        return facets

    def is_constant(self, facet: Tensor) -> bool:
        """Whether these are labels from `constant_facets`."""
        first = int(facet.max())
        at = bisect_right(self.flexible, (first, self.count)) - 1
        return at >= 0 and self.flexible[at][0] <= int(facet.min()) and first < self.flexible[at][1]

    def unite(self, left: Tensor, right: Tensor) -> None:
        """These labels go together, element by element after broadcasting."""
        broad_a, broad_b = np.broadcast_arrays(left.numpy(), right.numpy())
        a, b = broad_a.ravel(), broad_b.ravel()
        different = a != b
        if different.any():
            self.edges.append((a[different], b[different]))

    def unite_along(self, facet: Tensor, dims: Iterable[int]) -> Tensor:
        """Makes the labels equal along the dims, and returns the facet without them."""
        narrow = facet
        for dim in dims:
            narrow = narrow.narrow(dim, 0, 1)
        self.unite(facet, narrow)
        return narrow

    def freeze(self, facet: Tensor, reason: str) -> None:
        """None of these labels may be removed."""
        self.frozen.append((facet.reshape(-1).numpy(), reason))

    def mark_inexact(self, facet: Tensor, reason: str) -> None:
        """Removing these labels changes the function that is computed."""
        self.inexact.append((facet.reshape(-1).numpy(), reason))

    def conjunction(self, facet: Tensor, dims: Sequence[int]) -> Tensor | None:
        """Labels "gone iff all are gone" over dims (each kept with size 1); None if constant."""
        over = [d for d in dims if facet.shape[d] > 1]
        if not over:
            return facet
        rest = [d for d in varying(facet) if d not in over]
        if not rest:
            return None
        order = rest + over + [d for d in range(facet.dim()) if facet.shape[d] == 1]
        count = int(np.prod([facet.shape[d] for d in rest]))
        children = facet.permute(order).reshape(count, -1).numpy()
        inner = max(rest) < min(over)
        key = children.tobytes() + bytes([inner]) + str(count).encode()
        ids = self._known.get(key)
        if ids is None:
            first, again = _distinct_rows(children)
            ids = np.where(
                (children == children[:, :1]).all(axis=1),
                children[:, 0],
                self.fresh(len(first)).numpy()[again],
            )
            ids[(children == 0).any(axis=1)] = 0
            self.conjunctions.append(Conjunction(ids, np.ascontiguousarray(children), inner))
            self._known[key] = ids
        shape = [1 if d in over else s for d, s in enumerate(facet.shape)]
        return canonical(torch.from_numpy(ids).reshape(shape))

    def keep_rectangular(self, facets: Facets) -> None:
        """Facets that vary along several dims must lose whole slices only."""
        self.rectangles += [f.numpy() for f in facets if len(varying(f)) > 1]
