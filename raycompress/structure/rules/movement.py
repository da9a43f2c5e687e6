"""Data movement: the operator itself is executed on the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raycompress.structure.labels import Facets, canonical, move, spread, varying
from raycompress.structure.trace import Call, Rule

__all__ = ["MOVEMENTS", "run"]


def run(call: Call) -> None:
    """Runs the operator with its first tensor replaced by labels."""
    source: Tensor = call.args[0]
    out: Any = call.out
    shape = call.first_shape  # an in-place view has changed the tensor itself
    facets = call.facets(source)
    if isinstance(out, Tensor):
        moved = move(facets, shape, lambda f: call.func(f, *call.args[1:], **call.kwargs))
        call.set(out, moved)
        return
    pieces: list[Facets] = [[] for _ in out]
    for facet in facets:
        for i, part in enumerate(call.func(spread(facet, shape), *call.args[1:], **call.kwargs)):
            small = canonical(part)
            if small is not None:
                pieces[i].append(small)
    for tensor, moved in zip(out, pieces, strict=True):
        call.set(tensor, moved)


def _as_strided(call: Call) -> None:
    """Runs on labels that lie in memory as the tensor's elements do."""
    source: Tensor = call.args[0]
    out, shape = call.out, call.first_shape
    stride, start = call.first_layout
    if tuple(out.shape) == shape and all(
        s == t for size, s, t in zip(shape, stride, out.stride(), strict=True) if size > 1
    ):
        call.set(out, call.facets(source))
        return
    moved: Facets = []
    for facet in call.facets(source):
        laid = torch.empty_strided(shape, stride, dtype=torch.int64)
        laid.copy_(spread(facet, shape))
        offset = out.storage_offset() - start
        small = canonical(laid.as_strided(out.shape, out.stride(), offset).contiguous())
        if small is not None:
            moved.append(small)
    call.space.keep_rectangular(moved)
    call.set(out, moved)


def _view(call: Call) -> None:
    """View / reshape: the labels may need a copy where the data didn't."""
    source, out = call.args[0], call.out
    moved = move(call.facets(source), source.shape, lambda f: f.reshape(out.shape))
    moved = _without_hidden_constants(call, moved)
    call.space.keep_rectangular(moved)
    call.set(out, moved)
    for dim, size in enumerate(out.shape):
        if size > 1:
            call.tracer.saw(size, out.shape, moved, dim)


def _without_hidden_constants(call: Call, facets: Facets) -> Facets:
    """Drops labels of constants along dims that other labels share after a view.

    A key repeated for the queries of its group has such labels along the repeats. They would tie
    the first query of every group, the second of every group, and so on.
    """
    if len(facets) < 2:
        return facets
    constant = [call.space.is_constant(f) for f in facets]
    named = {d for f, c in zip(facets, constant, strict=True) if not c for d in varying(f)}
    return [f for f, c in zip(facets, constant, strict=True) if not (c and named & set(varying(f)))]


def _expand(call: Call) -> None:
    source, out = call.arg("self"), call.out
    new = out.dim() - source.dim()
    moved = [f.reshape((1,) * new + tuple(f.shape)) for f in call.facets(source)]
    before = (1,) * new + tuple(source.shape)
    moved += call.space.constant_facets(out.shape, [d for d, s in enumerate(before) if s == 1])
    call.set(out, moved)
    for dim, size in enumerate(out.shape):
        if size > 1:
            call.tracer.saw(size, out.shape, moved, dim)


def _repeat(call: Call) -> None:
    """Labels repeat with the data; a dim of size 1 becomes a constant along it."""
    source, out = call.arg("self"), call.out
    new = out.dim() - source.dim()
    before = (1,) * new + call.first_shape
    moved = move(call.facets(source), source.shape, lambda f: f.repeat(call.arg("repeats")))
    moved += call.space.constant_facets(out.shape, [d for d, s in enumerate(before) if s == 1])
    call.set(out, moved)
    for dim, size in enumerate(out.shape):
        if size > 1 and before[dim] == 1:
            call.tracer.saw(size, out.shape, moved, dim)


def _pairs(call: Call) -> None:
    """view_as_complex: real and imaginary part of a number are one channel."""
    source = call.arg("self")
    facets = []
    for facet in call.facets(source):
        last = source.dim() - 1
        if varying(facet) == (last,):
            call.space.freeze(facet, "real and imaginary part")
        else:
            facets.append(call.space.unite_along(facet, [last]).squeeze(last))
    call.set(call.out, [f for f in facets if varying(f)])


def _unpaired(call: Call) -> None:
    """view_as_real."""
    call.set(call.out, [f.unsqueeze(-1) for f in call.facets(call.arg("self"))])


def _triangle(call: Call) -> None:
    """tril, triu: which elements are zeroed depends on positions along the last two dims."""
    source: Tensor = call.arg("self")
    kept: Facets = []
    for facet in call.facets(source):
        if any(d >= source.dim() - 2 for d in varying(facet)):
            call.space.freeze(facet, f"{call.name} along channels")
        else:
            kept.append(facet)
    call.set(call.out, kept)


def _roll(call: Call) -> None:
    source = call.arg("self")
    dims = [d % source.dim() for d in call.arg("dims")]
    for facet in call.facets(source):
        for d in dims:
            if facet.shape[d] > 1:
                call.space.fixed.append((facet.numpy(), d, "rolled"))
    run(call)


def _repeat_interleave(call: Call) -> None:
    # repeat_interleave(x, int) reaches us as the index that it computes: plain integers.
    call.set(call.out, [])


_PLAIN = (
    "permute transpose t squeeze unsqueeze movedim flip unfold diagonal narrow unbind "
    "rot90 real imag swapaxes numpy_T mT adjoint "
    "expand_copy permute_copy"
).split()
_VIEWS = (
    "view _unsafe_view reshape _reshape_alias view_copy unflatten flatten _reshape_copy".split()
)

MOVEMENTS: dict[str, Rule] = {
    **{f"aten::{n}": run for n in _PLAIN},
    **{f"aten::{n}": _view for n in _VIEWS},
    "aten::as_strided": _as_strided,
    "aten::expand": _expand,
    "aten::tril": _triangle,
    "aten::triu": _triangle,
    "aten::repeat": _repeat,
    "aten::view_as_complex": _pairs,
    "aten::view_as_real": _unpaired,
    "aten::roll": _roll,
    "aten::repeat_interleave": _repeat_interleave,
}
