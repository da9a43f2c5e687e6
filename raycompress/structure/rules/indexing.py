"""Reading and writing by index: an indexed dim can't shrink, the others pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycompress.structure.labels import Facets, move
from raycompress.structure.merge import merge
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


def _whole_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks among the indices as the indices that they stand for."""
    result: list[Tensor | None] = []
    for i in indices:
        if i is not None and i.dtype in (torch.bool, torch.uint8):
            result += i.nonzero(as_tuple=True)
        else:
            result.append(i)
    return result


def _index(call: Call) -> None:
    source, indices = call.arg("self"), _whole_numbers(call.arg("indices"))
    dims = [d for d, i in enumerate(indices) if i is not None]
    facets = _indexed_leaf(call, source, dims)
    for facet in facets:
        for d in dims:
            if facet.shape[d] > 1:
                call.space.fixed.append((facet.numpy(), d, "picked by index"))
    moved = _picked(facets, source.shape, indices)
    call.space.keep_rectangular(moved)
    call.set(call.out, moved)


def _picked(facets: Facets, shape: Sequence[int], indices: list[Tensor | None]) -> Facets:
    """Facets of `source[indices]`; where no row is picked, those of one row."""
    filled = [i.new_zeros(1) if i is not None and not i.numel() else i for i in indices]
    return move(facets, shape, lambda f: torch.ops.aten.index(f, filled))


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


def _embedding_bag(call: Call) -> None:
    weight: Tensor = call.arg("weight")
    facets = call.facets(weight)
    for facet in facets:
        if facet.shape[0] > 1:
            call.space.freeze(facet, "rows are looked up by index")
    kept = [f for f in facets if f.shape[0] == 1]
    call.tracer.role(kept, "producer")
    call.set(call.out[0], kept)


def _split_at(call: Call, tensor: Tensor, dim: int) -> Facets:
    """The facets that don't run along an indexed dim; those that do are frozen."""
    kept = []
    for facet in call.facets(tensor):
        if facet.shape[dim] > 1:
            call.space.freeze(facet, f"{call.name} along channels")
        else:
            kept.append(facet)
    return kept


def _gather(call: Call) -> None:
    """out[i, j] = self[index[i, j], j] for dim 0: the other dims pass, with their sizes."""
    source, index = call.arg("self"), call.arg("index")
    if not source.dim() or not index.dim():
        call.set(call.out, [])
        return
    dim = call.arg("dim") % source.dim()
    own = _split_at(call, source, dim)
    shape = _narrow(source, dim)
    call.set(call.out, merge(call.space, own, shape, call.facets(index), index.shape))


def _scatter(call: Call) -> None:
    """self[index[i, j], j] = src[i, j] for dim 0, in all its variants."""
    source, index = call.arg("self"), call.arg("index")
    if not source.dim() or not index.dim():
        call.set(call.out, [])
        return
    dim = call.arg("dim") % source.dim()
    facets, shape = _split_at(call, source, dim), _narrow(source, dim)
    others = [index] + [call.before[n] for n in ("src",) if n in call.before]
    for tensor in others:
        own = _split_at(call, tensor, dim)
        facets = merge(call.space, facets, shape, own, _narrow(tensor, dim))
    call.set(call.out, facets)


def _index_add(call: Call) -> None:
    """self[index[i]] += source[i] along a dim; also copy and reduce."""
    target: Tensor = call.arg("self")
    if not target.dim():
        call.set(call.out, [])
        return
    dim = call.arg("dim") % target.dim()
    facets = _split_at(call, target, dim)
    source = call.before.get("source")
    if isinstance(source, Tensor) and source.dim() == target.dim():
        own = _split_at(call, source, dim)
        facets = merge(call.space, facets, _narrow(target, dim), own, _narrow(source, dim))
    call.set(call.out, facets)


def _index_put(call: Call) -> None:
    """self[indices] = values, or += them."""
    target, values = call.arg("self"), call.arg("values")
    indices = _whole_numbers(call.arg("indices"))
    dims = [d for d, i in enumerate(indices) if i is not None]
    kept = []
    for facet in call.facets(target):
        if any(facet.shape[d] > 1 for d in dims):
            call.space.freeze(facet, "written by index")
        else:
            kept.append(facet)
    written = _picked(kept, target.shape, indices)
    filled = [i.new_zeros(1) if i is not None and not i.numel() else i for i in indices]
    shape = torch.ops.aten.index(target, filled).shape
    if values.numel() > 1:
        merge(call.space, written, shape, call.facets(values), values.shape)
    call.set(call.out, kept)


def _narrow(tensor: Tensor, dim: int) -> list[int]:
    return [1 if d == dim else s for d, s in enumerate(tensor.shape)]


INDEXINGS: dict[str, Rule] = {
    "aten::index": _index,
    "aten::index_select": _index_select,
    "aten::embedding": _embedding,
    "aten::_embedding_bag": _embedding_bag,
    "aten::_embedding_bag_forward_only": _embedding_bag,
    "aten::gather": _gather,
    "aten::scatter": _scatter,
    "aten::scatter_add": _scatter,
    "aten::scatter_reduce": _scatter,
    "aten::index_add": _index_add,
    "aten::index_copy": _index_add,
    "aten::index_reduce": _index_add,
    "aten::index_fill": _index_add,
    "aten::index_put": _index_put,
    "aten::_index_put_impl": _index_put,
}
