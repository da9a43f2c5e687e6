"""Cutting tensors apart and joining them, along labelled dims too."""

from __future__ import annotations

import torch
from torch import Tensor

from raycompress.structure.labels import Facets, canonical, move, varying
from raycompress.structure.merge import merge
from raycompress.structure.rules.movement import run
from raycompress.structure.trace import Call, Rule

__all__ = ["JOININGS"]


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
    run(call)
    call.tracer.saw(source.shape[dim], source.shape, facets, dim)
    for part in call.out:
        call.tracer.saw(part.shape[dim], part.shape, call.facets(part), dim)


def _slice(call: Call) -> None:
    source, out = call.arg("self"), call.out
    dim = call.arg("dim") % source.dim()
    total, size = source.shape[dim], out.shape[dim]
    facets = call.facets(source)
    if 0 < size < total:  # nothing cut off, or nothing left: that stays so when channels go
        for facet in facets:
            if facet.shape[dim] == 1:
                continue
            start = call.arg("start") or 0
            start = start + total if start < 0 else start
            if size == 1 and start == 0 and varying(facet) == (dim,):
                call.space.freeze(facet.narrow(dim, 0, 1), "picked by its index")
            elif call.arg("step") == 1 and total % size == 0 and start % size == 0:
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
    """One element is picked: the first and the last stay what they are if they aren't removed."""
    source: Tensor = call.arg("self")
    dim, index = call.arg("dim") % source.dim(), int(call.arg("index"))
    kept: Facets = []
    for facet in call.facets(source):
        if varying(facet) == (dim,) and index in (0, -1):
            call.space.freeze(facet.select(dim, index), "picked by its index")
            continue
        kept.append(facet)
        if facet.shape[dim] > 1:
            call.space.fixed.append((facet.numpy(), dim, "one element is picked by its index"))
    call.set(call.out, move(kept, source.shape, lambda f: f.select(dim, index)))


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
    varies = [any(f.shape[d] > 1 for f in joined) for d in range(call.out.dim())]
    shape = [size if v else 1 for size, v in zip(call.out.shape, varies, strict=True)]
    # What the others have there is in the joined ones too, as labels or as zeros.
    rest_shape = [1 if v else size for size, v in zip(rest_shape, varies, strict=True)]
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


_SPLITS = "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk".split()

JOININGS: dict[str, Rule] = {
    **{f"aten::{n}": _split for n in _SPLITS},
    "aten::slice": _slice,
    "aten::select": _select,
    "aten::cat": _cat,
    "aten::stack": _stack,
    "aten::constant_pad_nd": _pad,
}
