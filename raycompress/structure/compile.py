"""Compiles sizes and cost terms of a trace to the arrays of a `CostModel`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from raycompress.structure.cost import CostModel, Ints
from raycompress.structure.pools import Pools, along, owner_of
from raycompress.structure.trace import Trace

__all__ = ["Sizes"]

_Form = tuple[int, tuple[tuple[int, int], ...]]  # constant, (group, size for each channel)...


class Sizes:
    """Sizes as linear functions of the kept counts, each distinct one once."""

    def __init__(self, seen: Trace, pools: Pools) -> None:
        self._seen = seen
        self._pools = pools
        self._forms: dict[_Form, int] = {(1, ()): 0}
        self._lines: dict[int, list[tuple[int, Ints]]] = {}
        self._known: dict[tuple[object, ...], list[int]] = {}

    def of(self, shape: Sequence[int], facets: Sequence[Tensor]) -> list[int]:
        """Position of the size of each dim of a tensor."""
        key = (*shape, *map(id, facets))  # the trace keeps all facets, so ids stay unique
        if key not in self._known:
            self._known[key] = self._of(shape, facets)
        return self._known[key]

    def _of(self, shape: Sequence[int], facets: Sequence[Tensor]) -> list[int]:
        forms: list[_Form] = [(int(size), ()) for size in shape]
        for facet in facets:
            if id(facet) not in self._lines:
                self._lines[id(facet)] = along(facet, self._pools.root)
            for dim, line in self._lines[id(facet)]:
                # The first facet that loses something decides; others along it are united.
                if len(line) == shape[dim] and not forms[dim][1]:
                    forms[dim] = self._form(line)
        return [self._forms.setdefault(f, len(self._forms)) for f in forms]

    def _form(self, line: Ints) -> _Form:
        pools = self._pools.pool_of[line]
        counts = np.bincount(pools[pools >= 0], minlength=len(self._pools.groups))
        slopes = tuple(
            (int(p), int(counts[p]) // self._pools.groups[p].num_channels)
            for p in np.flatnonzero(counts)
        )
        return int((pools < 0).sum()), slopes

    def model(self) -> CostModel:
        """The compiled cost model."""
        seen = self._seen
        terms: list[tuple[int, str, int, list[int]]] = []  # kind, module, coefficient, sizes
        for leaf in seen.leaves:
            if leaf.is_parameter:
                sizes = self.of(tuple(leaf.tensor.shape), leaf.facets or [])
                terms.append((0, owner_of(leaf.name), 1, sizes))
        for t in seen.terms:
            kind = 1 if t.kind == "macs" else 2
            terms.append((kind, t.module, t.coefficient, self.of(t.shape, t.facets)))
        width = max((len(t[3]) for t in terms), default=1)
        merged: dict[tuple[int, ...], list[int]] = {}
        layered: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for kind, module, coefficient, sizes in terms:
            key = tuple(sorted(s for s in sizes if s)) + (0,) * sizes.count(0)
            key += (0,) * (width - len(key))
            merged.setdefault(key, [0, 0, 0])[kind] += coefficient
            layered.setdefault((module, key), [0, 0, 0])[kind] += coefficient
        called = [m for m in seen.called if any(k[0] == m for k in layered)]
        names = tuple(dict.fromkeys([*called, *(k[0] for k in layered)]))
        place = {n: i for i, n in enumerate(names)}
        outputs = {n: tuple(self.of(*seen.outputs[n])) for n in names if n in seen.outputs}
        forms = list(self._forms)
        groups = self._pools.groups
        slope = np.zeros((len(forms), len(groups)), dtype=np.int64)
        for i, (_, slopes) in enumerate(forms):
            for group, step in slopes:
                slope[i, group] = step
        return CostModel(
            index={g.name: i for i, g in enumerate(groups)},
            full=np.array([g.num_channels for g in groups], dtype=np.int64),
            base=np.array([f[0] for f in forms], dtype=np.int64),
            slope=slope,
            factors=np.array(list(merged), dtype=np.int64).reshape(-1, width),
            coefficients=np.array(list(merged.values()), dtype=np.int64).reshape(-1, 3).T,
            batch=seen.batch,
            layers=names,
            outputs=outputs,
            owner=np.array([place[m] for m, _ in layered], dtype=np.int64),
            layer_factors=np.array([k for _, k in layered], dtype=np.int64).reshape(-1, width),
            layer_coefficients=np.array(list(layered.values()), dtype=np.int64).reshape(-1, 3).T,
        )
