"""Which arguments of each exported operator are sizes, places or positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from raycompress.structure.graph.program import Instruction, Path, Ref, refs_in
from raycompress.structure.graph.rules import constant_index
from raycompress.structure.graph.trace import Cut, GraphTrace, Handler, Ran, Reindex

__all__ = ["HANDLERS"]


def _size_list(name: str, first: Callable[[Ran, Tensor], int]) -> Handler:
    """The argument of that name lists the sizes of the result's dims, from `first` on."""

    def handler(run: GraphTrace, ran: Ran) -> None:
        out: Tensor = ran.out[0] if isinstance(ran.out, (tuple, list)) else ran.out
        run.sizes(ran, name, out, first(ran, out))

    return handler


def _front(ran: Ran, out: Tensor) -> int:
    return 0


def _normalized(ran: Ran, out: Tensor) -> int:
    return out.dim() - len(ran.values["normalized_shape"])


def _unflattened(ran: Ran, out: Tensor) -> int:
    return ran.dim


def _repeat(run: GraphTrace, ran: Ran) -> None:
    key, given = ran.given("repeats")
    new = ran.out.dim() - ran.source.dim()
    for i, count in enumerate(given):
        if isinstance(count, Ref) or (i >= new and ran.source.shape[i - new] > 1):
            continue
        run.numbers.append(run.number(ran, (key, i), ran.out, i))


def _filled(run: GraphTrace, ran: Ran) -> None:
    """One value everywhere: any size will do."""
    run.free(ran.out, range(ran.out.dim()))
    run.sizes(ran, "size", ran.out)


def _counted(run: GraphTrace, ran: Ran) -> None:
    """arange, linspace: the values at kept positions stay what they were."""
    if refs_in((ran.instruction.args, ran.instruction.kwargs)):
        return
    run.free(ran.out, [0])
    name = f"{ran.instruction.name}.out"
    if run.watch(name, ran.out, 0):
        run.reindexed.append(Reindex(ran.instruction.name, (), 0, (), "", name))


def _padded(run: GraphTrace, ran: Ran) -> None:
    """Padding along a labelled dim follows whatever it meets."""
    key, pad = ran.given("pad")
    mode = ran.values.get("mode", "constant")
    for i in range(0, len(pad), 2):
        dim = ran.out.dim() - 1 - i // 2
        before, after = pad[i], pad[i + 1]
        if isinstance(before, Ref) or isinstance(after, Ref) or mode != "constant":
            continue
        size = ran.out.shape[dim]
        for j, (start, stop) in ((i, (0, before)), (i + 1, (size - after, size))):
            if stop > start and run.fill(ran.out, dim, start, stop):
                run.numbers.append(run.number(ran, (key, j), ran.out, dim, (start, stop)))


def _pieces(run: GraphTrace, ran: Ran) -> None:
    starts = [0]
    for piece in ran.out:
        starts.append(starts[-1] + piece.shape[ran.dim])
    parts = tuple(run.number(ran, (), ran.source, ran.dim, ab) for ab in pairwise(starts))
    run.cuts.append(Cut(ran.instruction.name, ran.dim, parts))


def _slice(run: GraphTrace, ran: Ran) -> None:
    source, dim = ran.source, ran.dim
    total = source.shape[dim]
    if all(f.shape[dim] == 1 for f in run.tracer.facets(source)):
        return
    v = ran.values
    start, stop, step = slice(v["start"], v["end"], v["step"]).indices(total)
    if step > 1:
        _take(run, ran, (), dim, tuple(range(start, stop, step)))
        return
    for name, place in (("start", start), ("end", stop)):
        if 0 < place < total:
            key, _ = ran.given(name)
            run.numbers.append(run.number(ran, (key,), source, dim, (0, place)))


def _narrow(run: GraphTrace, ran: Ran) -> None:
    source, dim = ran.source, ran.dim
    start = int(ran.values["start"]) % source.shape[dim]
    stop = start + ran.out.shape[dim]
    if start:
        run.numbers.append(run.number(ran, (ran.given("start")[0],), source, dim, (0, start)))
    run.numbers.append(run.number(ran, (ran.given("length")[0],), source, dim, (start, stop)))


def _select(run: GraphTrace, ran: Ran) -> None:
    source, dim = ran.source, ran.dim
    index = int(ran.values["index"]) % source.shape[dim]
    if index and any(f.shape[dim] > 1 for f in run.tracer.facets(source)):
        run.numbers.append(run.number(ran, (ran.given("index")[0],), source, dim, (0, index)))


def _take(run: GraphTrace, ran: Ran, path: Path, dim: int, positions: tuple[int, ...]) -> None:
    name = ran.instruction.name
    source, out = f"{name}.source", f"{name}.out"
    if run.watch(source, ran.source, dim):
        run.watch(out, ran.out, dim)
        run.reindexed.append(Reindex(name, path, dim, positions, source, out))


def _index(run: GraphTrace, ran: Ran) -> None:
    if "indices" in ran.values:
        given = {d: i for d, i in enumerate(ran.values["indices"]) if i is not None}
        if len(given) != 1:
            return
        ((dim, index),) = given.items()
        path: Path = (ran.given("indices")[0], dim)
    else:
        dim, index = ran.dim, ran.values["index"]
        path = (ran.given("index")[0],)
    if constant_index(index, run.tracer) and run.tracer.leaf(ran.source) is None:
        size = ran.source.shape[dim]
        _take(run, ran, path, dim, tuple(int(i) % size for i in index.tolist()))


def _size(run: GraphTrace, ran: Ran) -> None:
    run.sizes_read.append(run.number(ran, (), ran.source, ran.dim))


def _attention(run: GraphTrace, ran: Ran) -> Instruction | None:
    """The scale is that of the dense head."""
    if ran.values["scale"] is not None:
        return None
    scale = 1.0 / math.sqrt(ran.values["query"].shape[-1])
    return replace(ran.instruction, kwargs={**ran.instruction.kwargs, "scale": scale})


def _squeeze(run: GraphTrace, ran: Ran) -> Instruction | None:
    """Only the dims that have size one in the dense model."""
    if ran.instruction.target != "aten::squeeze.default" or not run.tracer.facets(ran.source):
        return None
    dims = [d for d, size in enumerate(ran.source.shape) if size == 1]
    first = ran.instruction.args[0]
    return replace(ran.instruction, target="aten::squeeze.dims", args=(first, dims), kwargs={})


def _each(names: str, handler: Handler) -> dict[str, Handler]:
    return {f"aten::{n}": handler for n in names.split()}


HANDLERS: dict[str, Handler] = {
    **_each("view _unsafe_view expand", _size_list("size", _front)),
    **_each("reshape", _size_list("shape", _front)),
    **_each("unflatten", _size_list("sizes", _unflattened)),
    **_each("layer_norm rms_norm", _size_list("normalized_shape", _normalized)),
    **_each("repeat", _repeat),
    **_each("zeros ones full empty rand randn new_zeros new_ones new_full new_empty", _filled),
    **_each("arange linspace", _counted),
    **_each("pad constant_pad_nd", _padded),
    **_each(
        "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk "
        "tensor_split",
        _pieces,
    ),
    **_each("slice", _slice),
    **_each("narrow", _narrow),
    **_each("select", _select),
    **_each("index index_select", _index),
    **_each("sym_size", _size),
    **_each("scaled_dot_product_attention", _attention),
    **_each("squeeze", _squeeze),
}
