"""Convolutions of any rank, grouped, depthwise, transposed; index-exact for groups.

Joint index space: (batch, group, out in group, in in group). A group of the output is gone if
and only if that group of the input is. A weight's column serves all groups.
"""

from __future__ import annotations

import math

from torch import Tensor

from raycompress.structure.labels import Facets, varying
from raycompress.structure.merge import merge
from raycompress.structure.trace import Call, Rule

__all__ = ["CONVOLUTIONS"]

_UNREADABLE = "reads channels that can't be pruned"


def _inputs(call: Call, source: Tensor, groups: int) -> tuple[Facets, Facets]:
    """The input's facets in the joint space: those along channels, and those along the batch."""
    space = call.space
    channels: Facets = []
    batch: Facets = []
    for facet in call.facets(source):
        along_space = [d for d in varying(facet) if d > 1]
        if along_space and facet.shape[1] == 1:
            space.freeze(facet, "size along space is fixed by a convolution")
            continue
        # All positions meet in one sum, so labels can't differ along space.
        facet = space.unite_along(facet, along_space)
        if facet.shape[1] > 1:
            channels.append(facet.reshape(facet.shape[0], groups, 1, -1))
        else:
            batch.append(facet.reshape(-1, 1, 1, 1))
    for facet in channels:
        rest = space.conjunction(facet, [1, 3]) if facet.shape[0] > 1 else None
        if rest is not None:
            batch.append(rest)
    return channels, batch


def _weight(call: Call, weight: Tensor) -> tuple[Facets, Facets]:
    """The weight's facets along dim 0 and along dim 1, as (n,) tensors."""
    first: Facets = []
    second: Facets = []
    for facet in call.facets(weight):
        dims = varying(facet)
        if dims == (0,):
            first.append(facet.reshape(-1))
        elif dims == (1,):
            second.append(facet.reshape(-1))
        elif all(d > 1 for d in dims):
            call.space.freeze(facet, "positions of a kernel")
        else:
            call.space.freeze(facet, "labels mixed in a kernel")
    return first, second


def _tie(
    call: Call, inputs: Facets, columns: Facets, outs: Facets, groups: int, per_in: int
) -> None:
    """Unites input, weight columns (1, 1|groups, 1, in) and outputs (1, groups, out, 1)."""
    space = call.space
    for column in columns:
        if not inputs:
            space.freeze(column, _UNREADABLE)
        for source in inputs:
            extra = [d for d in varying(source) if column.shape[d] == 1]
            whole = space.conjunction(source, extra)
            if whole is None:
                space.freeze(column, _UNREADABLE)
            else:
                space.unite(column, whole)
    if groups == 1:
        return
    space.keep_rectangular(inputs)
    space.keep_rectangular(outs)
    for out in outs:
        if not inputs and out.shape[2] == 1:
            space.freeze(out, _UNREADABLE)
        for source in inputs:
            group_in = space.conjunction(source, [0, 3])
            group_out = space.conjunction(out, [2])
            if group_in is not None and group_out is not None:
                space.unite(group_in, group_out)


def _convolution(call: Call) -> None:
    source, weight, bias = call.arg("input"), call.arg("weight"), call.arg("bias")
    transposed, groups = bool(call.arg("transposed")), int(call.arg("groups"))
    space, tracer, out = call.space, call.tracer, call.out
    batched = source.dim() == weight.dim()
    assert batched  # ATen's convolution always has a batch dim
    channels_in, channels_out = source.shape[1], out.shape[1]
    per_in, per_out = channels_in // groups, channels_out // groups
    inputs, batch = _inputs(call, source, groups)
    first, second = _weight(call, weight)
    if not transposed:
        outs = [f.reshape(1, groups, per_out, 1) for f in first]
        columns = [f.reshape(1, 1, 1, per_in) for f in second]
        _tie(call, inputs, columns, outs, groups, per_in)
        sizes = [*outs, *columns]
    else:
        rows = [f.reshape(1, groups, 1, per_in) for f in first]
        if groups == 1:
            outs = [f.reshape(1, 1, per_out, 1) for f in second]
        else:
            # The out positions are shared by all groups; whole groups go, positions stay.
            for facet in second:
                space.freeze(facet, "shared by the groups of a transposed convolution")
            found = [space.conjunction(f, [0, 3]) for f in inputs]
            outs = [f for f in found if f is not None]
            space.keep_rectangular(inputs)
        for row in rows:
            if not inputs:
                space.freeze(row, _UNREADABLE)
            for facet in inputs:
                whole = space.conjunction(facet, [0]) if facet.shape[0] > 1 else facet
                if whole is not None:
                    space.unite(row, whole)
        sizes = [*rows, *(outs if groups == 1 else [])]
    if not tracer.is_data(weight):
        producers, consumers = (second, first) if transposed else (first, second)
        tracer.role(producers, "producer")
        tracer.role(consumers, "consumer")
    flat = (1,) * (out.dim() - 2)
    facets = [
        f.expand(-1, groups, per_out, 1).reshape(f.shape[0], channels_out, *flat) for f in outs
    ]
    facets += [f.reshape(-1, 1, *flat) for f in batch]
    if bias is not None:
        tracer.role(call.facets(bias), "producer")
        wide = [f.reshape(1, -1, *flat) for f in call.facets(bias)]
        facets = merge(space, facets, out.shape, wide, (1, channels_out, *flat))
    call.set(out, facets)
    spatial = math.prod(source.shape[2:] if transposed else out.shape[2:])
    shape = (source.shape[0], groups, per_out, per_in)
    tracer.multiply_adds(spatial * math.prod(weight.shape[2:]), shape, [*sizes, *batch])
    tracer.saw(
        channels_in, (channels_in,), [f.reshape(-1) for f in _flat(inputs)], 0, "in_channels"
    )
    tracer.saw(
        channels_out, (channels_out,), [f.reshape(-1) for f in _flat(outs)], 0, "out_channels"
    )
    if groups > 1:
        tracer.saw(groups, shape, inputs or outs, 1, "groups")


def _flat(facets: Facets) -> Facets:
    return [f[:1].expand(1, -1, -1, -1) for f in facets if any(s > 1 for s in f.shape[1:])]


CONVOLUTIONS: dict[str, Rule] = {"aten::convolution": _convolution}
