"""The scale of attention when its heads become narrower.

`scaled_dot_product_attention` divides scores by the root of the width of a head, unless a scale
is passed. In a slim model whose heads lost positions that width is another than in the dense one.
The root of the ratio is folded into the parameters that make the queries. That they do so
linearly, and that nothing else depends on them, is proven by one more forward pass: queries times
1/4 and a scale times 4 must give the same output, bit by bit. What can't be folded is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
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
        edges: how many labels' unions there were then.
        factors: of the default scale of each call; none for calls beyond the end.
    """

    def __init__(self, factors: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.queries: list[Tensor] = []
        self.edges: list[int] = []
        self.factors = factors
        self._tracer: Trace | None = None

    def forward(self, model: nn.Module) -> Callable[[Trace, Any, Any], Any]:
        """Runs the model for `trace`, with this mode on."""

        def run(tracer: Trace, args: Any, kwargs: Any) -> Any:
            self._tracer = tracer
            with self:
                return model(*args, **kwargs)

        return run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            at = len(self.queries)
            self.queries.append(query)
            if self._tracer is not None:
                self.edges.append(len(self._tracer.space.edges))
            if at < len(self.factors) and self.factors[at] != 1:
                kwargs["scale"] = 1 / math.sqrt(query.shape[-1]) * self.factors[at]
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
    found = {i: _makers(seen, calls.queries[i], calls.edges[i]) for i in narrow}
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


def _makers(seen: Trace, query: Tensor, number: int) -> tuple[QueryRows, ...]:
    """The rows of a weight whose labels the queries carry, and what is added to its outputs.

    Labels were united before the call: of a bias with the weight's, of the two positions of a
    rotary pair with each other.

    Args:
        seen: the trace.
        query: of shape (..., width of a head).
        number: of the edges that there were when attention was called.
    """
    facets = [f for f in seen.facets(query) if f.shape[-1] > 1]
    if len(facets) != 1:
        return ()
    width = query.shape[-1]
    heads = np.unique(facets[0].reshape(-1, width).numpy(), axis=0)
    spans = [
        (leaf, dim, start, start + leaf.tensor.shape[dim])
        for leaf in seen.leaves
        for dim, start in enumerate(leaf.starts)
        if start and leaf.is_parameter
    ]
    matrix = [s for s in spans if s[0].tensor.dim() > 1 and s[2] <= heads[0, 0] < s[3]]
    vectors = [s for s in spans if s[0].tensor.dim() == 1]
    head_of = np.full(seen.space.count, -1)
    allowed = np.zeros(seen.space.count, dtype=np.bool_)
    for _, _, first, last in [*matrix, *vectors]:
        allowed[first:last] = True
    head_of[heads] = np.arange(len(heads))[:, None]
    if not allowed[heads].all():
        return ()
    edges = seen.space.edges[:number]
    grown = True
    while grown:
        grown = False
        for left, right in edges:
            for a, b in ((left, right), (right, left)):
                new = (head_of[a] >= 0) & (head_of[b] < 0) & allowed[b]
                if new.any():
                    head_of[b[new]] = head_of[a[new]]
                    grown = True
    result = []
    for leaf, dim, first, last in [*matrix, *vectors]:
        mine = head_of[first:last]
        rows = [tuple(np.flatnonzero(mine == h).tolist()) for h in range(len(heads))]
        if all(len(r) == width for r in rows):
            result.append(QueryRows(leaf.name, dim, tuple(rows)))
    return tuple(result)


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
