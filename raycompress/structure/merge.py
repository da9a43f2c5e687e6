"""How the facets of two operands become the facets of a result.

`merge` is the elementwise case. A contraction is the same merge in the joint index space
(batch, m, k, n), followed by a conjunction over k, so attention needs no special case.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from raycompress.structure.labels import Facets, LabelSpace, run_length, varying

__all__ = ["aligned", "merge", "reduce_over"]

_FIXED = "meets a tensor whose size is fixed"


def aligned(facets: Facets, dims: int) -> Facets:
    """Facets with leading dims of size 1, as broadcasting aligns them."""
    return [f.reshape((1,) * (dims - f.dim()) + tuple(f.shape)) for f in facets]


def _covered(
    space: LabelSpace, facets: Facets, other: Facets, shape: Sequence[int], reason: str
) -> Facets:
    """Facets without the dims where they meet a size > 1 which no facet of the other explains.

    Along such a dim nothing can be removed by itself: its labels go together there. A facet that
    varies along no other dim is frozen and dropped.
    """
    explained = {d for f in other for d in varying(f)}
    kept = []
    for facet in facets:
        fixed = [d for d in varying(facet) if shape[d] > 1 and d not in explained]
        if len(fixed) == len(varying(facet)):
            # Carried on, a frozen label would freeze everything that it meets later.
            space.freeze(facet, reason)
        else:
            kept.append(space.unite_along(facet, fixed) if fixed else facet)
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
        before = [*left, *right]
        left = _covered(space, left, right, b_shape, reason)
        right = _covered(space, right, left, a_shape, reason)
        if len(before) == len(left) + len(right) and all(
            old is new for old, new in zip(before, [*left, *right], strict=True)
        ):
            break
    left, right, matched = _matched(space, left, right)
    a_fixed, b_fixed = _unexplained(a_shape, left), _unexplained(b_shape, right)
    result = list(left)
    alone: Facets = []  # of the right, independent of the left and of one another
    for g in right:
        facet = g
        rest: Facets = []
        for f in result:
            twin = matched.get(id(g), f)
            apart = varying(f) == varying(g) and twin is not f
            combined = None if apart else _pair(space, f, a_fixed, facet, b_fixed)
            if combined is None:
                rest.append(f)
            else:
                facet = combined
        if len(rest) == len(result):
            alone.append(g)
        else:
            result = [*rest, facet]
    return [f for f in [*result, *alone] if varying(f)]


def _unexplained(shape: Sequence[int], facets: Facets) -> list[int]:
    """The shape with size 1 along every dim that a facet explains."""
    explained = {d for f in facets for d in varying(f)}
    return [1 if d in explained else size for d, size in enumerate(shape)]


def _matched(
    space: LabelSpace, left: Facets, right: Facets
) -> tuple[Facets, Facets, dict[int, Tensor]]:
    """Sorts out axes that were flattened into one dim, and so share V.

    Each meets the one of the other operand that runs as it does. Where the other operand doesn't
    tell them apart, only the outermost can lose anything: an element that is gone for either of
    two reasons belongs to two channels. Returns what is left of both, and whom each of the right
    meets on the left.
    """
    matched: dict[int, Tensor] = {}
    gone: set[int] = set()
    for dims in {varying(f) for f in left} & {varying(g) for g in right}:
        ours = [f for f in left if varying(f) == dims]
        theirs = [g for g in right if varying(g) == dims]
        if len(ours) == len(theirs) == 1:
            continue
        pairs: list[tuple[Tensor, Tensor]] = []
        for g in theirs:
            free = [f for f in ours if all(f is not p for p, _ in pairs)]
            twin = next((f for f in free if _runs_alike(f, g)), None)
            if twin is not None:
                pairs.append((twin, g))
        if not pairs:
            pairs = [(max(ours, key=run_length), max(theirs, key=run_length))]
        matched |= {id(g): f for f, g in pairs}
        kept = {id(t) for pair in pairs for t in pair}
        for facet in [*ours, *theirs]:
            if id(facet) not in kept:
                space.freeze(facet, "flattened with other channels into one dim")
                gone.add(id(facet))
    return (
        [f for f in left if id(f) not in gone],
        [g for g in right if id(g) not in gone],
        matched,
    )


def _runs_alike(f: Tensor, g: Tensor) -> bool:
    """Whether the labels of one are equal exactly where those of the other are."""
    first, second = f.reshape(-1).numpy(), g.reshape(-1).numpy()
    pairs = len(np.unique(np.stack([first, second]), axis=1).T)
    return pairs == len(np.unique(first)) == len(np.unique(second))


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
    space.keep_rectangular([g])
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
