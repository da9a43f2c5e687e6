"""Elementwise operators: operands are merged with broadcasting."""

from __future__ import annotations

from torch import Tensor

from raycompress.structure.labels import Facets
from raycompress.structure.merge import merge
from raycompress.structure.trace import Call, Rule

__all__ = ["ELEMENTWISE", "elementwise"]


def elementwise(call: Call) -> None:
    """Merges all tensor operands; every output has the result's facets."""
    facets: Facets = []
    shape: tuple[int, ...] = ()
    for tensor in call.tensors():
        # 0-dim tensors and scalars meet every channel alike.
        if tensor.dim() == 0 or tensor is call.before.get("out"):
            continue
        facets = merge(call.space, facets, shape, call.facets(tensor), tensor.shape)
        dims = max(len(shape), tensor.dim())
        wide = (1,) * (dims - len(shape)) + shape
        other = (1,) * (dims - tensor.dim()) + tuple(tensor.shape)
        shape = tuple(max(a, b) for a, b in zip(wide, other, strict=True))
    outs = call.out if isinstance(call.out, (list, tuple)) else [call.out]
    for out in outs:
        if isinstance(out, Tensor):
            call.set(out, [f for f in facets if f.dim() == out.dim()])


def _copy(call: Call) -> None:
    """self.copy_(src): the labels of src, broadcast; what self held is overwritten."""
    source, target = call.arg("src"), call.arg("self")
    facets = merge(call.space, call.facets(source), source.shape, [], (1,) * target.dim())
    call.set(target, facets)


def _like(call: Call) -> None:
    """A new tensor of the same shape follows the sizes of the old one."""
    call.set(call.out, list(call.facets(call.arg("self"))))


def _fill(call: Call) -> None:
    """A constant fills the tensor in place; its size still follows the channels."""
    call.set(call.out, list(call.facets(call.arg("self"))))


def _constant(call: Call) -> None:
    """One value everywhere: the tensor's sizes follow what it meets."""
    facets = call.space.constant_facets(call.out.shape, range(call.out.dim()))
    call.set(call.out, facets)
    for dim, size in enumerate(call.out.shape):
        if size > 1:
            call.tracer.saw(size, call.out.shape, facets, dim)


def _glu(call: Call) -> None:
    """x[:half] * sigmoid(x[half:]): the halves lose the same positions."""
    source: Tensor = call.arg("self")
    dim = call.arg("dim") % source.dim()
    half = call.out.shape[dim]
    facets = []
    for facet in call.facets(source):
        if facet.shape[dim] > 1:
            call.space.parts.append((facet.numpy(), dim, half))
            first, second = facet.narrow(dim, 0, half), facet.narrow(dim, half, half)
            call.space.unite(first, second)
            facets.append(first)
        else:
            facets.append(facet)
    call.set(call.out, facets)


def _created(call: Call) -> None:
    """A tensor made from nothing: no labels, its sizes are fixed."""
    if isinstance(call.out, Tensor):
        call.set(call.out, [])


_NAMES = (
    "clone _to_copy dropout native_dropout alias detach lift_fresh lift_fresh_copy where "
    "masked_fill gelu silu hardswish hardsigmoid hardtanh leaky_relu elu relu relu6 mish celu "
    "selu softplus threshold rrelu rrelu_with_noise prelu _prelu_kernel log_sigmoid_forward "
    "clamp clamp_min clamp_max lerp addcmul addcdiv bernoulli nan_to_num pow isin bucketize "
    "contiguous hardshrink softshrink fake_quantize_per_tensor_affine _conj _neg_view "
    "resolve_conj resolve_neg rsub floor_divide fmod remainder xlogy special_xlog1py "
    "_fused_dropout glu_jvp complex polar logical_not logical_and logical_or"
).split()
_LIKE = "zeros_like ones_like empty_like full_like rand_like randn_like".split()
_CONSTANT = (
    "zeros ones empty full new_zeros new_ones new_full new_empty empty_strided new_empty_strided "
    "_efficientzerotensor"
).split()
_CREATED = (
    "arange linspace rand randn eye scalar_tensor tensor randint randperm tril_indices "
    "triu_indices logspace hann_window"
).split()

ELEMENTWISE: dict[str, Rule] = {
    **{f"aten::{n}": elementwise for n in _NAMES},
    **{f"aten::{n}": _like for n in _LIKE},
    **{f"aten::{n}": _constant for n in _CONSTANT},
    **{f"aten::{n}": _created for n in _CREATED},
    **{f"aten::{n}": _fill for n in ("fill", "zero", "normal", "uniform", "bernoulli_")},
    "aten::copy": _copy,
    "aten::glu": _glu,
}
