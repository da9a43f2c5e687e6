"""Writing in place into a view also writes labels into the tensor that it is a view of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raycompress.structure.labels import Facets, canonical, spread, varying

if TYPE_CHECKING:
    from raycompress.structure.trace import Call, Trace

__all__ = ["remember_views", "write_back"]

_VIEW = "_raycompress_view"


def remember_views(call: Call, outputs: list[Tensor]) -> None:
    """Remembers of which tensor the outputs of a view operator are views, and how."""
    source = next((v for v in call.before.values() if isinstance(v, Tensor)), None)
    for i, t in enumerate(outputs):
        if source is not None and t is not source:
            setattr(t, _VIEW, (source, call.func, call.args, call.kwargs, i))


def write_back(tracer: Trace, view: Tensor) -> None:
    """After an in-place write into a view: the labels of its base, element by element."""
    link = getattr(view, _VIEW, None)
    if link is None:
        return
    base, func, args, kwargs, index = link
    if func is torch.ops.aten.as_strided.default and base.storage_offset():
        for old_facet in tracer.facets(base):  # its offset counts from elsewhere
            tracer.space.freeze(old_facet, "written through as_strided")
        return
    written = tracer.facets(view)
    old = tracer.facets(base)
    if not written and not old:
        return
    result: Facets = []
    free = list(old)
    sources: list[Tensor | None] = list(written)
    for facet in sources or [None]:
        match = None
        if facet is not None:
            seen = [f for f in free if _shows(f, base, func, args, kwargs, index, varying(facet))]
            match = seen[0] if seen else None
        elif free:
            match = free[0]
        if match is not None:
            free = [f for f in free if f is not match]
            full = _laid_out(match, base)
        else:
            full = torch.zeros_like(base, dtype=torch.int64)
        target = func(full, *args[1:], **kwargs)
        target = target if isinstance(target, Tensor) else target[index]
        if facet is None:
            target.zero_()
        else:
            target.copy_(spread(facet, view.shape))
        kept = canonical(full)
        if kept is not None and match is not None:
            # What was written to one place of a dim that had no labels holds for all of it.
            kept = tracer.space.unite_along(kept, set(varying(kept)) - set(varying(match)))
        if kept is not None and varying(kept):
            tracer.space.keep_rectangular([kept])
            result.append(kept)
    tracer.set(base, result + free)
    write_back(tracer, base)


def _laid_out(facet: Tensor, base: Tensor) -> Tensor:
    """Labels that lie in memory as the elements of the base do, for `as_strided`."""
    return torch.empty_like(base, dtype=torch.int64).copy_(spread(facet, base.shape))


def _shows(
    facet: Tensor, base: Tensor, func: Any, args: Any, kwargs: Any, index: int, dims: Any
) -> bool:
    """Whether the facet of the base varies along the same dims when seen through the view."""
    seen = func(_laid_out(facet, base), *args[1:], **kwargs)
    seen = canonical(seen if isinstance(seen, Tensor) else seen[index])
    return seen is not None and varying(seen) == tuple(dims)
