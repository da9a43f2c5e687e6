"""Matrix products.

Shapes: a is (batch, m, k), b is (batch, k, n); joint index space (batch, m, k, n).
"""

from __future__ import annotations

from torch import Tensor

from raycompress.structure.labels import Facets, varying
from raycompress.structure.merge import merge, reduce_over
from raycompress.structure.trace import Call, Rule

__all__ = ["CONTRACTIONS", "contract"]


def contract(call: Call, a: Tensor, b: Tensor) -> Facets:
    """Facets of `a @ b` for a of shape (..., m, k) and b of shape (..., k, n)."""
    space, tracer = call.space, call.tracer
    wide_a = [f.unsqueeze(-1) for f in call.facets(a)]
    wide_b = [f.unsqueeze(-3) for f in call.facets(b)]
    a_shape = (*a.shape, 1)
    b_shape = (*b.shape[:-2], 1, *b.shape[-2:])
    rank = len(a_shape)
    k = rank - 2
    for tensor, facets, out in ((a, wide_a, rank - 3), (b, wide_b, rank - 1)):
        if not tracer.is_data(tensor):
            tracer.role([f for f in facets if f.shape[out] > 1], "producer")
            tracer.role([f for f in facets if f.shape[k] > 1], "consumer")
    joint = merge(space, wide_a, a_shape, wide_b, b_shape)
    shape = tuple(max(s, t) for s, t in zip(a_shape, b_shape, strict=True))
    tracer.multiply_adds(1, shape, joint)
    result = []
    for facet in joint:
        reduced = space.conjunction(facet, [k])
        if reduced is not None:
            result.append(reduced.squeeze(k))
    return [f for f in result if varying(f)]


def _product(call: Call, a: Tensor, b: Tensor) -> None:
    call.set(call.out, contract(call, a, b))


def _mm(call: Call) -> None:
    _product(call, call.arg("self"), call.arg("mat2"))


def _added(call: Call, added: Tensor, a: Tensor, b: Tensor) -> None:
    facets = contract(call, a, b)
    if added.dim() == 0:
        call.set(call.out, facets)
        return
    if not call.tracer.is_data(added):
        call.tracer.role(call.facets(added), "producer")
    call.set(call.out, merge(call.space, facets, call.out.shape, call.facets(added), added.shape))


def _addmm(call: Call) -> None:
    _added(call, call.arg("self"), call.arg("mat1"), call.arg("mat2"))


def _baddbmm(call: Call) -> None:
    _added(call, call.arg("self"), call.arg("batch1"), call.arg("batch2"))


def _vector(call: Call) -> None:
    """Mv and dot: facets that run only along the contracted dim are united and disappear."""
    a: Tensor = call.arg("self")
    b: Tensor = call.arg(next(n for n in ("vec", "tensor", "other") if call.has(n)))
    joint = merge(call.space, call.facets(a), a.shape, call.facets(b), b.shape)
    call.tracer.multiply_adds(1, a.shape, joint)
    result = []
    for facet in joint:
        reduced = call.space.conjunction(facet, [a.dim() - 1])
        if reduced is not None:
            result.append(reduced.squeeze(a.dim() - 1))
    call.set(call.out, [f for f in result if varying(f)])


def _trilinear(call: Call) -> None:
    """nn.Bilinear: a product of three tensors, each with unsqueezed dims, summed over some."""
    space, tracer = call.space, call.tracer
    joint: Facets = []
    shape: tuple[int, ...] = ()
    over = [int(d) for d in call.arg("sumdim")]
    for i in "123":
        tensor: Tensor = call.arg(f"i{i}")
        dims = [int(d) for d in call.arg(f"expand{i}")]
        facets, own = list(call.facets(tensor)), tuple(tensor.shape)
        for d in sorted(dims):
            facets = [f.unsqueeze(d) for f in facets]
            own = (*own[:d], 1, *own[d:])
        if not tracer.is_data(tensor):
            kept = [f for f in facets if not set(varying(f)) & set(over)]
            tracer.role(kept, "producer")
            tracer.role([f for f in facets if set(varying(f)) & set(over)], "consumer")
        joint = merge(space, joint, shape or (1,) * len(own), facets, own)
        shape = tuple(max(a, b) for a, b in zip(shape or own, own, strict=True))
    tracer.multiply_adds(1, shape, joint)
    result = reduce_over(space, joint, over, keepdim=False)
    call.set(call.out, result)


CONTRACTIONS: dict[str, Rule] = {
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": _addmm,
    "aten::baddbmm": _baddbmm,
    "aten::_trilinear": _trilinear,
    "aten::mv": _vector,
    "aten::dot": _vector,
    "aten::vdot": _vector,
}
