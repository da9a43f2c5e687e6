"""Reading and writing by index: an indexed dim can't shrink, the others pass."""

from __future__ import annotations

import torch
from torch import Tensor

from raycompress.structure.labels import Facets, move
from raycompress.structure.trace import Call, Rule

__all__ = ["INDEXINGS"]


def _indexed_leaf(call: Call, source: Tensor, dims: list[int]) -> Facets:
    """A parameter that is read by index keeps its length: other indices may be read later."""
    facets = call.facets(source)
    if call.tracer.leaf(source) is None:
        return facets
    for facet in facets:
        if any(facet.shape[d] > 1 for d in dims):
            call.space.freeze(facet, "read by index")
    return [f for f in facets if not any(f.shape[d] > 1 for d in dims)]


def _index(call: Call) -> None:
    source, indices = call.arg("self"), call.arg("indices")
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        expanded = []
        for i in indices:
            if i is not None and i.dtype in (torch.bool, torch.uint8):
                expanded += list(i.nonzero(as_tuple=True))
            else:
                expanded.append(i)
        indices = expanded
    dims = [d for d, i in enumerate(indices) if i is not None]
    facets = _indexed_leaf(call, source, dims)
    for facet in facets:
        for d in dims:
            if facet.shape[d] > 1:
                call.space.fixed.append((facet.numpy(), d, "picked by index"))
    moved = move(facets, source.shape, lambda f: torch.ops.aten.index(f, indices))
    call.space.keep_rectangular(moved)
    call.set(call.out, moved)


def _index_select(call: Call) -> None:
    source = call.arg("self")
    dim = call.arg("dim") % source.dim()
    facets = _indexed_leaf(call, source, [dim])
    for facet in facets:
        if facet.shape[dim] > 1:
            call.space.fixed.append((facet.numpy(), dim, "picked by index"))
    moved = move(facets, source.shape, lambda f: f.index_select(dim, call.arg("index")))
    call.set(call.out, moved)


def _embedding(call: Call) -> None:
    weight, indices = call.arg("weight"), call.arg("indices")
    facets = call.facets(weight)
    for facet in facets:
        if facet.shape[0] > 1:
            call.space.freeze(facet, "rows are looked up by index")
    kept = [f for f in facets if f.shape[0] == 1]
    call.tracer.role(kept, "producer")
    new = indices.dim() - 1
    call.set(call.out, [f.reshape((1,) * new + tuple(f.shape)) for f in kept])


INDEXINGS: dict[str, Rule] = {
    "aten::index": _index,
    "aten::index_select": _index_select,
    "aten::embedding": _embedding,
}
