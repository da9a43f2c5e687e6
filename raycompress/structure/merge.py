"""How the facets of two operands become the facets of a result.

`merge` is the elementwise case. A contraction is the same merge in the joint index space
(batch, m, k, n), followed by a conjunction over k, so attention needs no special case.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raycompress.structure.labels import Facets, LabelSpace, varying

__all__ = ["aligned", "merge", "reduce_over"]

_FIXED = "meets a tensor whose size is fixed"


def aligned(facets: Facets, dims: int) -> Facets:
    """Facets with leading dims of size 1, as broadcasting aligns them."""
    return [f.reshape((1,) * (dims - f.dim()) + tuple(f.shape)) for f in facets]


def _covered(
    space: LabelSpace, facets: Facets, other: Facets, shape: Sequence[int], reason: str
) -> Facets:
    """Drops and freezes the facets that meet a size > 1 which no facet of the other explains."""
    explained = {d for f in other for d in varying(f)}
    kept = []
    for facet in facets:
        if any(shape[d] > 1 and d not in explained for d in varying(facet)):
            # Carried on, a frozen label would freeze everything that it meets later.
            space.freeze(facet, reason)
        else:
            kept.append(facet)
    return kept


def merge(
    space: LabelSpace,
    left: Facets,
    left_shape: Sequence[int],
    right: Facets,
    right_shape: Sequence[int],
    reason: str = _FIXED,
) -> Facets:
    """Facets of `left op right`, elementwise with broadcasting; unites what must go together.

    Args:
        space: the labels.
        left: facets of the left operand.
        left_shape: its shape.
        right: facets of the right operand.
        right_shape: its shape.
        reason: why a facet is frozen that meets a size which no label explains.
    """
    dims = max(len(left_shape), len(right_shape))
    left, right = aligned(left, dims), aligned(right, dims)
    a_shape = (1,) * (dims - len(left_shape)) + tuple(left_shape)
    b_shape = (1,) * (dims - len(right_shape)) + tuple(right_shape)
    while True:
        left = _covered(space, left, right, b_shape, reason)
        again = _covered(space, right, left, a_shape, reason)
        stable = len(again) == len(right)
        right = again
        if stable:
            break
    result = list(left)
    for g in right:
        facet = g
        rest: Facets = []
        for f in result:
            combined = _pair(space, f, a_shape, facet, b_shape)
            if combined is None:
                rest.append(f)
            else:
                facet = combined
        result = [*rest, facet]
    return [f for f in result if varying(f)]


def _pair(
    space: LabelSpace, f: Tensor, f_shape: Sequence[int], g: Tensor, g_shape: Sequence[int]
) -> Tensor | None:
    """One facet for two that overlap, None if they are independent."""
    vf, vg = set(varying(f)), set(varying(g))
    if not vf & vg:
        return None
    if vf == vg:
        space.unite(f, g)
        return f
    if vf < vg:
        return _contained(space, f, f_shape, g)
    if vg < vf:
        return _contained(space, g, g_shape, f)
    f = space.unite_along(f, sorted(vf - vg))
    g = space.unite_along(g, sorted(vg - vf))
    space.unite(f, g)
    return f


def _contained(space: LabelSpace, f: Tensor, f_shape: Sequence[int], g: Tensor) -> Tensor:
    """V(f) lies inside V(g): f is gone where all of g is."""
    extra = [d for d in varying(g) if f.shape[d] == 1]
    real = [d for d in extra if f_shape[d] > 1]
    if real:
        g = space.unite_along(g, real)
    whole = space.conjunction(g, [d for d in extra if d not in real])
    if whole is not None:
        space.unite(f, whole)
    return g


def reduce_over(space: LabelSpace, facets: Facets, dims: Sequence[int], keepdim: bool) -> Facets:
    """Facets after a reduction over dims (non-negative)."""
    result = []
    for facet in facets:
        reduced = space.conjunction(facet, dims)
        if reduced is None:
            continue
        if not keepdim:
            shape = [s for d, s in enumerate(reduced.shape) if d not in dims]
            reduced = reduced.reshape(shape)
        if varying(reduced):
            result.append(reduced)
    return result
