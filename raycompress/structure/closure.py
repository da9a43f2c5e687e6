"""From united labels to classes of labels that are removed together.

Whole-head policy, in this order: (a) an inner conjunction (over head_dim, over the channels of a
convolution group) is united with its children, to a fixpoint; (b) only then, what still varies
along two or more dims is united over all but the last. Both at once would collapse everything.
Head-dim policy: no (a). A conjunction whose children have become one class *is* that class. One
whose children differ never happens, so its class can't be removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its parts load when they are used first: replicas need none
from numpy.typing import NDArray

from raycompress.structure.labels import LabelSpace

__all__ = ["Classes", "close"]

Ids = NDArray[np.int64]
Heads = Literal["whole", "dim"]
_Edges = tuple[Ids, Ids]


@dataclass(frozen=True)
class Classes:
    """The result of the closure.

    Attributes:
        root: class of each label id, shape (ids,).
        frozen: whether a class can't be removed, shape (classes,).
        reasons: why, for frozen classes.
        inexact: class -> why removing it changes the function.
    """

    root: Ids
    frozen: NDArray[np.bool_]
    reasons: dict[int, str]
    inexact: dict[int, str]


def close(space: LabelSpace, heads: Heads = "whole") -> Classes:
    """Closes the constraints of a label space."""
    edges = [e for e in space.edges]
    if heads == "whole":
        for c in space.conjunctions:
            if c.inner:
                edges.append(_pairs(c.ids[:, None], c.children))
    root = _components(space.count, edges)
    while True:
        new = [e for e in _derived(space, root) if len(e[0])]
        if not new:
            break
        # The constraints below may only see the fixpoint of those above.
        root = _components(space.count, [*edges, *new])
        edges += new
    return _freeze(space, root)


def _pairs(left: Ids, right: Ids) -> _Edges:
    a, b = np.broadcast_arrays(left, right)
    return a.ravel(), b.ravel()


def _components(count: int, edges: list[_Edges]) -> Ids:
    if not edges:
        return np.arange(count)
    a = np.concatenate([e[0] for e in edges])
    b = np.concatenate([e[1] for e in edges])
    real = (a != 0) & (b != 0)  # 0 isn't a label: what is united with it is frozen, not joined
    a, b = a[real], b[real]
    ones = np.ones(len(a), dtype=np.int8)
    graph = scipy.sparse.coo_matrix((ones, (a, b)), shape=(count, count))
    # Root 0 must stay the class of "not prunable" alone.
    _, classes = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return np.asarray(classes, dtype=np.int64)


def _derived(space: LabelSpace, root: Ids) -> Iterator[_Edges]:
    """Edges that the constraints add, given the classes so far; first come, first served."""
    found = False
    for c in space.conjunctions:
        children = root[c.children]
        same = (children == children[:, :1]).all(axis=1) & (c.ids != 0)
        same &= root[c.ids] != children[:, 0]
        if same.any():
            found = True
            yield c.ids[same], c.children[same, 0]
    if found:
        return
    touched: set[int] = set()
    for labels in space.rectangles:
        edge = _all_but_last(labels, root)
        # The same labels in another order of dims may be rectangular once this edge is in.
        if edge is not None and touched.isdisjoint(mine := set(root[labels].ravel().tolist())):
            touched |= mine
            found = True
            yield edge
    if found:
        return
    for labels, dim, size in space.parts:
        moved = np.moveaxis(labels, dim, -1)
        tiled = moved.reshape(-1, moved.shape[-1] // size, size)
        edge = _where_different(tiled, np.broadcast_to(tiled[:, :1], tiled.shape), root)
        if edge is not None:
            yield edge


def _varies(classes: Ids) -> list[int]:
    return [
        d
        for d, size in enumerate(classes.shape)
        if size > 1 and (classes != np.take(classes, [0], axis=d)).any()
    ]


def _all_but_last(labels: Ids, root: Ids) -> _Edges | None:
    dims = _varies(root[labels])
    if len(dims) < 2:
        return None
    first = labels
    for d in dims[:-1]:
        first = np.take(first, [0], axis=d)
    return _where_different(labels, np.broadcast_to(first, labels.shape), root)


def _where_different(left: Ids, right: Ids, root: Ids) -> _Edges | None:
    different = root[left] != root[right]
    # A label that met 0 is frozen; 0 joins no class, so the pair would stay different for ever.
    different &= (left != 0) & (right != 0)
    return (left[different], right[different]) if different.any() else None


def _freeze(space: LabelSpace, root: Ids) -> Classes:
    reasons: dict[int, str] = {int(root[0]): "not prunable"}

    def freeze(ids: Ids, reason: str) -> None:
        for c in np.unique(root[ids]):
            reasons.setdefault(int(c), reason)

    for ids, reason in space.frozen:
        freeze(ids, reason)
    for a, b in space.edges:
        zero = (a == 0) != (b == 0)
        if zero.any():
            freeze(np.where(a == 0, b, a)[zero], "meets channels that can't be pruned")
    for labels in space.rectangles:
        varies = _varies(root[labels])
        if len(varies) > 1:  # only zeros are left to differ
            freeze(labels[labels != 0], "can't stay rectangular with channels that are kept")
    for labels, dim, size in space.parts:
        moved = np.moveaxis(labels, dim, -1)
        tiled = moved.reshape(-1, moved.shape[-1] // size, size)
        mixed = (tiled == 0).any(axis=1) & (tiled != 0).any(axis=1)
        if mixed.any():
            columns = np.broadcast_to(mixed[:, None], tiled.shape)
            freeze(tiled[columns & (tiled != 0)], "cut into equal parts with kept channels")
    for labels, dim, reason in space.fixed:
        if dim in _varies(root[labels]):
            freeze(labels.ravel(), reason)
    for c in space.conjunctions:
        children = root[c.children]
        same = (children == children[:, :1]).all(axis=1)
        alone = ~same & (c.ids != 0)
        if alone.any():
            freeze(c.ids[alone], "needed while any of several channels is kept")
    number = int(root.max()) + 1
    frozen = np.zeros(number, dtype=np.bool_)
    frozen[list(reasons)] = True
    inexact: dict[int, str] = {}
    for ids, reason in space.inexact:
        for k in np.unique(root[ids]):
            inexact.setdefault(int(k), reason)
    return Classes(root, frozen, reasons, inexact)
