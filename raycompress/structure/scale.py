"""The scale of attention when its heads become narrower.

`scaled_dot_product_attention` divides scores by the root of the width of a head, unless a scale
is passed. In a slim model whose heads lost positions that width is another than in the dense one.
The root of the ratio is folded into the parameters that make the queries. That they do so
linearly, and that nothing else depends on them, is proven by one more forward pass: queries times
1/4 and a scale times 4 must give the same output, bit by bit. What can't be folded is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from raycompress.structure.labels import varying
from raycompress.structure.leaves import flat
from raycompress.structure.model import QueryRows
from raycompress.structure.quiet import quiet
from raycompress.structure.trace import Trace

__all__ = ["AttentionCalls", "query_rows"]

_QUARTER = 0.25  # a power of two whose root is one as well: no rounding


class AttentionCalls(TorchFunctionMode):
    """Records the queries of attention with the default scale, or multiplies that scale.

    Attributes:
        queries: what `scaled_dot_product_attention` got, in order of the calls.
        factors: of the default scale of each call; none for calls beyond the end.
    """

    def __init__(self, factors: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.queries: list[Tensor] = []
        self.factors = factors

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            at = len(self.queries)
            self.queries.append(query)
            if at < len(self.factors) and self.factors[at] != 1:
                kwargs["scale"] = query.shape[-1] ** -0.5 * self.factors[at]
        return func(*args, **kwargs)


def query_rows(
    model: nn.Module,
    seen: Trace,
    calls: AttentionCalls,
    args: Any,
    kwargs: Any,
    heads: Literal["whole", "dim"],
) -> tuple[QueryRows, ...]:
    """The parameters whose rows make queries that a default scale divides.

    Where a call's can't be found, the widths of its heads are frozen.

    Args:
        model: the dense model.
        seen: its trace.
        calls: what was recorded during the trace.
        args: positional arguments of the traced pass.
        kwargs: its keyword arguments.
        heads: what heads may lose; where several go whole, each keeps its width.
    """
    narrow = [i for i, q in enumerate(calls.queries) if _can_narrow(seen, q, heads)]
    found = {i: _makers(seen, calls.queries[i]) for i in narrow}
    run = _prover(model, calls, args, kwargs)
    proven = {i for i in narrow if found[i]}
    if proven and not run(proven, found):
        proven = {i for i in proven if run({i}, found)}
    for i in narrow:
        if i not in proven:
            for facet in seen.facets(calls.queries[i]):
                if facet.shape[-1] > 1:
                    seen.space.freeze(
                        facet, "the scale of attention can't be folded into its queries"
                    )
    folded = [rows for i in sorted(proven) for rows in found[i]]
    return (*dict.fromkeys(folded), *_stock(model))


def _can_narrow(seen: Trace, query: Tensor, heads: Literal["whole", "dim"]) -> bool:
    along = [varying(f) for f in seen.facets(query) if f.shape[-1] > 1]
    return any(heads == "dim" or len(dims) == 1 for dims in along)


def _makers(seen: Trace, query: Tensor) -> tuple[QueryRows, ...]:
    """The rows whose labels the queries carry, in a weight and in what is added to it."""
    facets = [f for f in seen.facets(query) if f.shape[-1] > 1]
    if len(facets) != 1:
        return ()
    ids = np.unique(facets[0].reshape(-1, facets[0].shape[-1]).numpy(), axis=0)
    weight = _owner(seen, ids)
    if weight is None:
        return ()
    result = [weight]
    flat_ids = ids.reshape(-1)
    order = np.argsort(flat_ids)
    ordered = flat_ids[order]
    for left, right in seen.space.edges:
        for a, b in ((left, right), (right, left)):
            at = np.searchsorted(ordered, a)
            at[at == len(order)] = 0
            mine = ordered[at] == a
            if not mine.any():
                continue
            other = np.zeros(flat_ids.shape, dtype=np.int64)
            other[order[at[mine]]] = b[mine]
            added = _owner(seen, other.reshape(ids.shape), vectors=True)
            if added is not None and added not in result:
                result.append(added)
    return tuple(result)


def _owner(seen: Trace, ids: NDArray[np.int64], *, vectors: bool = False) -> QueryRows | None:
    """The parameter that all these ids belong to."""
    for leaf in seen.leaves:
        if not leaf.is_parameter or (leaf.tensor.dim() == 1) != vectors:
            continue
        for dim, start in enumerate(leaf.starts):
            if start and (ids >= start).all() and (ids < start + leaf.tensor.shape[dim]).all():
                rows = tuple(tuple(int(i) for i in row) for row in ids - start)
                return QueryRows(leaf.name, dim, rows)
    return None


def _prover(
    model: nn.Module, calls: AttentionCalls, args: Any, kwargs: Any
) -> Callable[[set[int], dict[int, tuple[QueryRows, ...]]], bool]:
    parameters = dict(model.named_parameters())
    reference: list[list[Tensor]] = []

    def outputs(scaled: dict[str, Tensor], factors: tuple[float, ...]) -> list[Tensor]:
        with quiet(model), AttentionCalls(factors):
            return flat(functional_call(model, scaled, args, kwargs))

    def prove(which: set[int], found: dict[int, tuple[QueryRows, ...]]) -> bool:
        if not reference:
            reference.append(outputs({}, ()))
        scaled: dict[str, Tensor] = {}
        for rows in dict.fromkeys(r for i in which for r in found[i]):
            tensor = scaled.get(rows.parameter, parameters[rows.parameter].detach())
            scaled[rows.parameter] = rows.times(tensor, _QUARTER)
        factors = tuple(1 / _QUARTER if i in which else 1.0 for i in range(len(calls.queries)))
        got = outputs(scaled, factors)
        return all(torch.equal(a, b) for a, b in zip(reference[0], got, strict=True))

    return prove


def _stock(model: nn.Module) -> list[QueryRows]:
    """The queries of nn.MultiheadAttention, whose scale also comes from the width it sees."""
    result = []
    for name, module in model.named_modules():
        if type(module) is not nn.MultiheadAttention:
            continue
        prefix = f"{name}." if name else ""
        weight = "in_proj_weight" if module.in_proj_weight is not None else "q_proj_weight"
        heads = np.arange(module.embed_dim).reshape(module.num_heads, module.head_dim)
        rows = tuple(tuple(int(i) for i in row) for row in heads)
        result.append(QueryRows(f"{prefix}{weight}", 0, rows))
        if module.in_proj_bias is not None:
            result.append(QueryRows(f"{prefix}in_proj_bias", 0, rows))
    return result
