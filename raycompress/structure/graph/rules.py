"""Rules of operators whose literal numbers graph form rewrites: cutting needs no constraint."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from raycompress.structure.labels import Facets, move, varying
from raycompress.structure.rules.operators import find_rule
from raycompress.structure.trace import Call, Rule, Trace

__all__ = ["CUTS", "GRAPH_RULES", "constant_index"]


def constant_index(index: object, tracer: Trace) -> TypeGuard[Tensor]:
    """Whether an index can be replaced by another constant."""
    return (
        isinstance(index, Tensor)
        and not tracer.is_data(index)
        and index.dim() == 1
        and index.dtype in (torch.int64, torch.int32)
    )


def _cut(call: Call) -> None:
    """Split and slice: the labels of each piece are those of its elements."""
    source: Tensor = call.args[0]
    outs = call.out if isinstance(call.out, (list, tuple)) else [call.out]
    for i, out in enumerate(outs):

        def piece(labels: Tensor, i: int = i) -> Tensor:
            cut = call.func(labels, *call.args[1:], **call.kwargs)
            result: Tensor = cut if isinstance(cut, Tensor) else cut[i]
            return result

        call.set(out, move(call.facets(source), call.first_shape, piece))


def _select(call: Call) -> None:
    """One element is picked: it stays, all others are free."""
    source: Tensor = call.arg("self")
    dim = call.arg("dim") % source.dim()
    kept: Facets = []
    for facet in call.facets(source):
        if facet.shape[dim] == 1:
            kept.append(facet)
        elif varying(facet) == (dim,):
            call.space.freeze(facet.select(dim, call.arg("index")), "picked by its index")
        else:
            call.space.fixed.append((facet.numpy(), dim, "one element is picked by its index"))
            kept.append(facet)
    call.set(
        call.out,
        move(kept, source.shape, lambda f: f.select(dim, call.arg("index"))),
    )


def _unbind(call: Call) -> None:
    """The code takes every element of the dim, so all of them stay."""
    source: Tensor = call.arg("self")
    dim = call.arg("dim") % source.dim()
    for facet in call.facets(source):
        if facet.shape[dim] > 1:
            call.space.fixed.append((facet.numpy(), dim, "each element is taken by its index"))
    _cut(call)


def _by_index(call: Call) -> None:
    """A constant index is rewritten; one that depends on data, or of another kind, isn't."""
    source: Tensor = call.arg("self")
    if call.has("indices"):
        given = {d: i for d, i in enumerate(call.arg("indices")) if i is not None}
        dim, index = next(iter(given.items())) if len(given) == 1 else (0, None)
    else:
        dim, index = call.arg("dim") % source.dim(), call.arg("index")
    facets = call.facets(source)
    single = all(varying(f) == (dim,) for f in facets if f.shape[dim] > 1)
    leaf = call.tracer.leaf(source)
    if not constant_index(index, call.tracer) or not single or leaf is not None:
        usual = find_rule(call.func)
        assert usual is not None
        usual(call)
        return
    call.set(call.out, move(facets, source.shape, lambda f: f.index_select(dim, index)))


# Instructions that this file's rules serve; within any other, the usual rules hold.
CUTS = frozenset(
    f"aten::{n}"
    for n in (
        "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk "
        "tensor_split narrow slice select index index_select unbind"
    ).split()
)
GRAPH_RULES: dict[str, Rule] = {
    **{
        f"aten::{n}": _cut
        for n in (
            "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk "
            "tensor_split narrow slice"
        ).split()
    },
    "aten::select": _select,
    "aten::unbind": _unbind,
    "aten::index": _by_index,
    "aten::index_select": _by_index,
}
