"""Selection pools: classes with the same (parameter, dim, multiplicity) signature."""

from __future__ import annotations

from collections import defaultdict
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.structure.closure import Classes
from raycompress.structure.model import ChannelGroup, Member, Role
from raycompress.structure.trace import Leaf, Trace

__all__ = ["Pools", "along", "owner_of"]

Ids = NDArray[np.int64]
_MIX = np.uint64(0x9E3779B97F4A7C15)


def owner_of(parameter: str) -> str:
    """Name of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def along(facet: Tensor, root: Ids) -> list[tuple[int, Ids]]:
    """(dim, classes) where a facet varies after closure; empty if it is constant."""
    classes = root[facet.numpy()]
    dims = [
        d
        for d, size in enumerate(classes.shape)
        if size > 1 and (classes != np.take(classes, [0], axis=d)).any()
    ]
    if len(dims) != 1:
        return []
    at = [0] * classes.ndim
    line = classes[tuple(slice(None) if d == dims[0] else i for d, i in enumerate(at))]
    return [(dims[0], line)]


class Pools:
    """The prunable classes of a trace, sorted into channel groups.

    Attributes:
        groups: the channel groups.
        pool_of: group of each class, -1 for none, shape (classes,).
    """

    def __init__(self, seen: Trace, classes: Classes, model: nn.Module) -> None:
        self.root = classes.root
        self._classes = classes
        self._dims = [
            (leaf, dim, classes.root[start : start + leaf.tensor.shape[dim]])
            for leaf in seen.leaves
            for dim, start in enumerate(leaf.starts)
            if start
        ]
        number = len(classes.frozen)
        produced = np.zeros(number, dtype=np.bool_)
        for leaf, dim, cls in self._dims:
            if leaf.is_parameter and leaf.roles.get(dim) == "producer":
                produced[cls] = True
        prunable = produced & ~classes.frozen
        prunable[classes.root[0]] = False
        signature = self._signatures(seen, number)
        self.pool_of = np.full(number, -1, dtype=np.int64)
        self.position = np.zeros(number, dtype=np.int64)
        order = {name: i for i, name in enumerate(seen.called)}
        self.groups = self._build(prunable, signature, order, model)

    def _signatures(self, seen: Trace, number: int) -> NDArray[np.uint64]:
        """Sum of hashes of what each class holds; equal sums are interchangeable classes."""
        total = np.zeros(number, dtype=np.uint64)
        lines = [cls for _, _, cls in self._dims]
        known: set[int] = set()
        for facets in [t.facets for t in seen.terms] + [s.facets for s in seen.sizes]:
            for facet in facets:
                if id(facet) not in known:
                    known.add(id(facet))
                    lines += [line for _, line in along(facet, self.root)]
        for key, line in enumerate(lines):
            cls, counts = np.unique(line, return_counts=True)
            mixed = (counts.astype(np.uint64) + np.full(len(cls), key + 1, np.uint64) * _MIX) * _MIX
            mixed ^= mixed >> np.uint64(31)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
            total[cls] += mixed
        return total

    def _build(
        self,
        prunable: NDArray[np.bool_],
        signature: NDArray[np.uint64],
        order: dict[str, int],
        model: nn.Module,
    ) -> tuple[ChannelGroup, ...]:
        types = {n: type(m).__name__ for n, m in model.named_modules()}
        ids = np.flatnonzero(prunable)
        if not len(ids):
            return ()
        _, pool = np.unique(signature[ids], return_inverse=True)
        self.pool_of[ids] = pool
        members: dict[int, list[tuple[Leaf, int, Ids]]] = defaultdict(list)
        for leaf, dim, cls in self._dims:
            for p in np.unique(self.pool_of[cls]):
                if p >= 0:
                    members[int(p)].append((leaf, dim, cls))
        drafts = []
        for p, dims in members.items():
            producers = [
                (order.get(owner_of(leaf.name), len(order)), i)
                for i, (leaf, dim, _) in enumerate(dims)
                if leaf.is_parameter and leaf.roles.get(dim) == "producer"
            ]
            first = min(producers)[1]
            leaf, dim, cls = dims[first]
            mine = self.pool_of[cls] == p
            values, places = np.unique(cls[mine], return_index=True)
            sequence = values[np.argsort(places)]  # channels in the order of the first producer
            self.position[sequence] = np.arange(len(sequence))
            owners = dict.fromkeys(
                owner_of(dims[i][0].name) or dims[i][0].name for _, i in sorted(producers)
            )
            start = (min(producers)[0], int(np.flatnonzero(mine)[0]))
            drafts.append((start, p, sequence, dims, tuple(owners)))
        drafts.sort(key=lambda d: (*d[0], d[1]))
        renumber = np.full(len(drafts) + 1, -1, dtype=np.int64)
        for new, (_, p, *_) in enumerate(drafts):
            renumber[p] = new
        self.pool_of = np.where(self.pool_of >= 0, renumber[self.pool_of], -1)
        used: dict[str, int] = {}
        groups = []
        for new, (_, _, sequence, dims, names) in enumerate(drafts):
            name = names[0]
            used[name] = used.get(name, 0) + 1
            if used[name] > 1:
                name = f"{name}:{used[names[0]]}"
            reason = next(
                (self._classes.inexact[c] for c in sequence.tolist() if c in self._classes.inexact),
                "",
            )
            groups.append(
                ChannelGroup(
                    name=name,
                    num_channels=len(sequence),
                    members=tuple(self._member(new, len(sequence), *d) for d in dims),
                    producers=names,
                    types=tuple(dict.fromkeys(types.get(n, "Parameter") for n in names)),
                    exact=not reason,
                    reason=reason,
                )
            )
        return tuple(groups)

    def _member(self, pool: int, number: int, leaf: Leaf, dim: int, cls: Ids) -> Member:
        places = np.flatnonzero(self.pool_of[cls] == pool)
        by_channel = places[np.argsort(self.position[cls[places]], kind="stable")]
        role = leaf.roles.get(dim, "elementwise")
        assert role in get_args(Role)
        return Member(leaf.name, dim, by_channel.reshape(number, -1), role)  # type: ignore[arg-type]
