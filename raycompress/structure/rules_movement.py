"""Data movement: the operator itself is executed on the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raycompress.structure.labels import Facets, canonical, move, spread, varying
from raycompress.structure.merge import merge
from raycompress.structure.trace import Call, Rule

__all__ = ["MOVEMENTS"]


def _run(call: Call) -> None:
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
    call.space.keep_rectangular(moved)
    call.set(out, moved)
    for dim, size in enumerate(out.shape):
        if size > 1:
            call.tracer.saw(size, out.shape, moved, dim)


def _expand(call: Call) -> None:
    source, out = call.arg("self"), call.out
    new = out.dim() - source.dim()
    moved = [f.reshape((1,) * new + tuple(f.shape)) for f in call.facets(source)]
    call.set(out, moved)
    for dim, size in enumerate(out.shape):
        if size > 1:
            call.tracer.saw(size, out.shape, moved, dim)


def _parts(call: Call, facets: Facets, dim: int, size: int, sizes: list[int]) -> None:
    """Cutting a labelled dim: equal parts stay equal, others must not change."""
    equal = len(set(sizes)) == 1
    for facet in facets:
        if facet.shape[dim] == 1:
            continue
        if equal:
            call.space.parts.append((facet.numpy(), dim, sizes[0]))
        elif call.name == "aten::split_with_sizes":
            # The sizes come from the module's attributes, which are corrected.
            pass
        else:
            call.space.fixed.append((facet.numpy(), dim, "cut at a fixed place"))


def _split(call: Call) -> None:
    source = call.arg("self")
    dim = call.arg("dim") % source.dim()
    facets = call.facets(source)
    sizes = [t.shape[dim] for t in call.out]
    _parts(call, facets, dim, source.shape[dim], sizes)
    _run(call)
    call.tracer.saw(source.shape[dim], source.shape, facets, dim)
    for part in call.out:
        call.tracer.saw(part.shape[dim], part.shape, call.facets(part), dim)


def _indexed_leaf(call: Call, source: Tensor, dims: list[int]) -> Facets:
    """A parameter that is read by index keeps its length: other indices may be read later."""
    facets = call.facets(source)
    if call.tracer.leaf(source) is None:
        return facets
    for facet in facets:
        if any(facet.shape[d] > 1 for d in dims):
            call.space.freeze(facet, "read by index")
    return [f for f in facets if not any(f.shape[d] > 1 for d in dims)]


def _slice(call: Call) -> None:
    source, out = call.arg("self"), call.out
    dim = call.arg("dim") % source.dim()
    total, size = source.shape[dim], out.shape[dim]
    facets = call.facets(source)
    if size < total:
        for facet in facets:
            if facet.shape[dim] == 1:
                continue
            start = call.arg("start") or 0
            start = start + total if start < 0 else start
            if call.arg("step") == 1 and total % max(size, 1) == 0 and start % size == 0:
                call.space.parts.append((facet.numpy(), dim, size))
            elif call.arg("step") > 1 and total == size * call.arg("step"):
                # every step-th channel: the same survivors in each run of `step`
                step = call.arg("step")
                shape = [*facet.shape]
                shape[dim : dim + 1] = [size, step]
                tiled = facet.reshape(shape).transpose(dim, dim + 1)
                call.space.rectangles.append(tiled.contiguous().numpy())
            else:
                call.space.fixed.append((facet.numpy(), dim, "cut at a fixed place"))
    moved = move(facets, source.shape, lambda f: call.func(f, *call.args[1:], **call.kwargs))
    call.set(out, moved)
    if size < total:
        call.tracer.saw(size, out.shape, moved, dim)


def _select(call: Call) -> None:
    source = call.arg("self")
    dim = call.arg("dim") % source.dim()
    for facet in call.facets(source):
        if facet.shape[dim] > 1:
            call.space.fixed.append((facet.numpy(), dim, "one element is picked by its index"))
    _run(call)


def _cat(call: Call) -> None:
    """Facets along the joined dim are joined (absent: 0), the others are merged."""
    tensors = [t for t in call.arg("tensors") if not (t.dim() == 1 and t.numel() == 0)]
    dim = call.arg("dim") % call.out.dim()
    along: list[list[Tensor | None]] = []  # each: one facet (or None) for every tensor
    rest: Facets = []
    rest_shape: list[int] = [1] * call.out.dim()
    for i, tensor in enumerate(tensors):
        facets = call.facets(tensor)
        mine = [f for f in facets if f.shape[dim] > 1]
        others = [f for f in facets if f.shape[dim] == 1]
        for facet in mine:
            others_v = [d for d in varying(facet) if d != dim]
            for row in along:
                seen = next(r for r in row if r is not None)
                if row[i] is None and [d for d in varying(seen) if d != dim] == others_v:
                    row[i] = facet
                    break
            else:
                new: list[Tensor | None] = [None] * len(tensors)
                new[i] = facet
                along.append(new)
        narrow = [1 if d == dim else s for d, s in enumerate(tensor.shape)]
        if i == 0:
            rest, rest_shape = others, narrow
        else:
            rest = merge(call.space, rest, rest_shape, others, narrow)
    joined: Facets = []
    for row in along:
        width = [max(f.shape[d] for f in row if f is not None) for d in range(call.out.dim())]
        pieces = []
        for tensor, piece in zip(tensors, row, strict=True):
            width[dim] = tensor.shape[dim]
            base = torch.zeros((1,) * len(width), dtype=torch.int64) if piece is None else piece
            pieces.append(base.expand(width))
        whole = canonical(torch.cat(pieces, dim))
        if whole is not None:
            joined.append(whole)
    call.space.keep_rectangular(joined)
    # The joined facets explain sizes only where they vary.
    shape = tuple(
        size if any(f.shape[d] > 1 for f in joined) else 1 for d, size in enumerate(call.out.shape)
    )
    call.set(call.out, merge(call.space, joined, shape, rest, rest_shape))


def _stack(call: Call) -> None:
    """All tensors share their labels, position by position."""
    facets: Facets = []
    shape: tuple[int, ...] = ()
    tensors = call.arg("tensors")
    dim = call.arg("dim") % call.out.dim()
    rows = [call.facets(t) for t in tensors]
    if all(len(r) == len(rows[0]) for r in rows) and all(
        varying(f) == varying(g) for r in rows for f, g in zip(r, rows[0], strict=True)
    ):
        stacked = []
        for column in zip(*rows, strict=True):
            s = canonical(torch.stack(list(column), dim))
            if s is not None:
                stacked.append(s)
        call.space.keep_rectangular(stacked)
        call.set(call.out, stacked)
        return
    for tensor, row in zip(tensors, rows, strict=True):
        facets = merge(call.space, facets, shape or (1,) * tensor.dim(), row, tensor.shape)
        shape = tuple(tensor.shape)
    call.set(call.out, [f.unsqueeze(dim) for f in facets])


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


def _pad(call: Call) -> None:
    """Padding along a labelled dim adds channels that can't be pruned."""
    source, pad = call.arg("self"), list(call.arg("pad"))
    result = []
    for facet in call.facets(source):
        amounts = [p if facet.shape[facet.dim() - 1 - i // 2] > 1 else 0 for i, p in enumerate(pad)]
        padded = torch.constant_pad_nd(facet, amounts, 0)
        small = canonical(padded)
        if small is not None:
            result.append(small)
    call.space.keep_rectangular(result)
    call.set(call.out, result)


def _roll(call: Call) -> None:
    source = call.arg("self")
    dims = [d % source.dim() for d in call.arg("dims")]
    for facet in call.facets(source):
        for d in dims:
            if facet.shape[d] > 1:
                call.space.fixed.append((facet.numpy(), d, "rolled"))
    _run(call)


def _repeat_interleave(call: Call) -> None:
    # repeat_interleave(x, int) reaches us as the index that it computes: plain integers.
    call.set(call.out, [])


_PLAIN = (
    "permute transpose t squeeze unsqueeze movedim flip repeat tile pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal narrow unbind "
    "tril triu rot90 view_as_real view_as_complex real imag swapaxes numpy_T mT adjoint "
    "expand_copy permute_copy"
).split()
_VIEWS = (
    "view _unsafe_view reshape _reshape_alias view_copy unflatten flatten _reshape_copy".split()
)
_SPLITS = "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk".split()

MOVEMENTS: dict[str, Rule] = {
    **{f"aten::{n}": _run for n in _PLAIN},
    **{f"aten::{n}": _view for n in _VIEWS},
    **{f"aten::{n}": _split for n in _SPLITS},
    "aten::as_strided": _as_strided,
    "aten::expand": _expand,
    "aten::slice": _slice,
    "aten::select": _select,
    "aten::cat": _cat,
    "aten::stack": _stack,
    "aten::index": _index,
    "aten::index_select": _index_select,
    "aten::embedding": _embedding,
    "aten::constant_pad_nd": _pad,
    "aten::roll": _roll,
    "aten::repeat_interleave": _repeat_interleave,
}
