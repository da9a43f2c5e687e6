"""Reductions, softmax and what else mixes along a dim."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from raycompress.structure.labels import varying
from raycompress.structure.merge import reduce_over
from raycompress.structure.trace import Call, Rule

__all__ = ["ALONG", "REDUCED", "REDUCTIONS", "reduced_dims"]


def reduced_dims(call: Call, rank: int) -> list[int]:
    """Dims that a reduction of a tensor of `rank` dims runs over: all, where it names none."""
    dim: Any = call.arg("dim") if call.has("dim") else None
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    dims = dim if isinstance(dim, (list, tuple)) else [dim]
    return [d % rank for d in dims] if rank else []


def _reduce(call: Call) -> None:
    source: Tensor = call.arg("self")
    dims = reduced_dims(call, source.dim())
    facets = call.facets(source)
    reason = f"{call.name} over channels in {call.tracer.module!r}"
    if call.name in _BLIND_TO_ZERO:
        reason += " (unless the removed ones are zero there)"
    for facet in facets:
        if set(varying(facet)) & set(dims):
            call.space.mark_inexact(facet, reason)
    keepdim = bool(call.before.get("keepdim", False))
    reduced = reduce_over(call.space, facets, dims, keepdim)
    for out in call.out if isinstance(call.out, (list, tuple)) else [call.out]:
        call.set(out, [f for f in reduced if f.dim() == out.dim()])


def _along(call: Call) -> None:
    """softmax: the same shape, but what is removed changes the rest."""
    source: Tensor = call.arg("self")
    dims = reduced_dims(call, source.dim())
    facets = call.facets(source)
    for facet in facets:
        if set(varying(facet)) & set(dims):
            call.space.mark_inexact(facet, f"{call.name} over channels in {call.tracer.module!r}")
    call.set(call.out, list(facets))


def _ordered(call: Call) -> None:
    """sort, topk, cumsum: positions along the dim mean something, so it can't shrink."""
    source: Tensor = call.arg("self")
    dims = reduced_dims(call, source.dim())
    kept = []
    for facet in call.facets(source):
        if set(varying(facet)) & set(dims):
            call.space.freeze(facet, f"{call.name} along channels")
        else:
            kept.append(facet)
    for out in call.out if isinstance(call.out, (list, tuple)) else [call.out]:
        call.set(out, [f for f in kept if f.dim() == out.dim()])


REDUCED = tuple(
    f"aten::{n}"
    for n in (
        "sum mean var std var_mean std_mean amax amin max min argmax argmin prod logsumexp norm "
        "linalg_vector_norm any all median nansum count_nonzero _unique2 nonzero aminmax"
    ).split()
)
ALONG = tuple(f"aten::{n}" for n in ("_softmax", "_log_softmax", "_safe_softmax"))
_BLIND_TO_ZERO = frozenset(
    f"aten::{n}" for n in ("sum", "norm", "linalg_vector_norm", "any", "nansum", "count_nonzero")
)

REDUCTIONS: dict[str, Rule] = {
    **dict.fromkeys(REDUCED, _reduce),
    **dict.fromkeys(ALONG, _along),
    **{
        f"aten::{n}": _ordered for n in ("sort", "topk", "cumsum", "cumprod", "argsort", "kthvalue")
    },
}
