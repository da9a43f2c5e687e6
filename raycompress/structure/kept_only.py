"""Runs an operator so that what it mixes across channels is that of the kept channels alone.

An operation that reduces over positions of which some are gone (norm, mean, softmax, ...) is
given the kept ones; what keeps its shape is put back at the dense positions, with zeros at the
others. A contraction reads zeros where a contracted position is gone, since f(0) need not be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raycompress.errors import StructureError
from raycompress.structure.rules.movement import MOVEMENTS
from raycompress.structure.rules.norm import in_training
from raycompress.structure.rules.reduction import ALONG, REDUCED, reduced_dims
from raycompress.structure.trace import Call, Trace

__all__ = ["OnKept", "Positions"]

Positions = dict[int, Tensor]  # dim -> kept indices along it

_COUNTS = "_raycompress_counts"  # of a sum: divisors that make it a mean, (dense, kept) each


class OnKept:
    """Runs each operator of a trace: those across channels on the kept positions alone.

    Attributes:
        operations: those whose result isn't the one over all positions.
        divides: whether a sum was divided by how many positions it ran over.
    """

    def __init__(self, kept: Callable[[Trace, Tensor], Positions], by_kept: bool) -> None:
        """Takes how to read the model.

        Args:
            kept: kept indices along each dim of a tensor that has lost something.
            by_kept: a sum divided by how many positions it ran over is a mean written by hand,
                and is divided by how many are kept.
        """
        self._kept = kept
        self.by_kept = by_kept
        self.operations: dict[str, None] = {}
        self.divides = False

    def __call__(self, call: Call) -> Any:
        """Outputs of an operator, of the dense shapes."""
        handle = _HANDLERS.get(call.name)
        result = None if handle is None else handle(self, call)
        result = call.func(*call.args, **call.kwargs) if result is None else result
        if call.name in MOVEMENTS and isinstance(result, Tensor):
            counts = getattr(call.args[0], _COUNTS, None)
            if counts is not None:
                setattr(result, _COUNTS, counts)
        return result

    def kept(self, call: Call, tensor: Tensor, dims: Any) -> Positions:
        """Kept indices along those of the dims that have lost something."""
        if not tensor.dim():
            return {}
        found = self._kept(call.tracer, tensor)
        wanted = {d % tensor.dim() for d in dims}
        return {d: index for d, index in found.items() if d in wanted}

    def changed(self, call: Call, plain: Any, result: Any, name: str) -> None:
        """Remembers an operation whose result isn't the one over all channels."""
        pairs = zip(_listed(plain), _listed(result), strict=True)
        if any(_differ(a, b) for a, b in pairs):
            self.operations.setdefault(f"{name} {call.tracer.module!r}")


def _listed(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]


def _differ(a: Tensor, b: Tensor) -> bool:
    """More than rounding in another order of summation."""
    if a.shape != b.shape or not a.is_floating_point():
        return not torch.equal(a, b)
    if not a.numel():
        return False
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    noise = 256 * torch.finfo(a.dtype).eps * float(a.abs().max())
    return float((a - b).abs().max()) > noise


def _cut(tensor: Tensor, kept: Positions) -> Tensor:
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index)
    return tensor


def _put_back(small: Tensor, kept: Positions, shape: Any) -> Tensor:
    """At the dense positions again, with zeros at those that are gone."""
    for dim, index in kept.items():
        wide = [*small.shape]
        wide[dim] = shape[dim]
        small = small.new_zeros(wide).index_copy(dim, index, small)
    return small


def _again(call: Call, **changed: Any) -> Any:
    """The operator with other arguments; what it writes to is a copy."""
    values = {**call.before, **changed}
    for argument in call.func._schema.arguments:
        value = values.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, Tensor):
            values[argument.name] = value.clone()
    return call.func(**values)


def _reduction(run: OnKept, call: Call) -> Any:
    source: Tensor = call.arg("self")
    kept = run.kept(call, source, reduced_dims(call, source.dim()))
    if not kept:
        return None
    if call.name in ("aten::nonzero", "aten::_unique2") or call.has("out"):
        raise StructureError(f"{call.name} over removed channels has no reference")
    cut = _cut(source, kept)
    result = _again(call, self=cut)
    if call.name in ALONG:
        result = _put_back(result, kept, source.shape)
    positions = {"aten::argmax": 0, "aten::argmin": 0}.get(call.name, 1)
    outs = [result] if isinstance(result, Tensor) else list(result)
    if call.name in _POSITIONS and len(outs) > positions:
        if len(kept) > 1 or (source.dim() > 1 and call.arg("dim") is None):
            raise StructureError(f"{call.name} over all removed channels has no reference")
        outs[positions] = next(iter(kept.values()))[outs[positions]]
        result = outs[0] if isinstance(result, Tensor) else tuple(outs)
    run.changed(call, _again(call), result, f"{call.name} over channels in")
    if call.name in _SUMS or call.name in _ROOTS:
        dims = reduced_dims(call, source.dim())
        n, m = (math.prod(t.shape[d] for d in dims) for t in (source, cut))
        pairs = ((n, m), (n - 1, m - 1)) if call.name in _SUMS else ((n**0.5, m**0.5),)
        setattr(result, _COUNTS, tuple(p for p in pairs if p[0] > 1 and p[1] > 0))
    return result


def _division(run: OnKept, call: Call) -> Any:
    """A sum by the number of its positions, or times its inverse."""
    by, other = call.name == "aten::div", call.arg("other")
    if not isinstance(other, (int, float)) or other == 0:
        return None
    for dense, kept in getattr(call.arg("self"), _COUNTS, ()):
        if math.isclose(other if by else 1 / other, dense, rel_tol=1e-9):
            run.divides = True
            if run.by_kept:
                return call.func(**{**call.before, "other": kept if by else 1 / kept})
    return None


_SUMS = frozenset(("aten::sum", "aten::nansum"))
_ROOTS = frozenset(("aten::norm", "aten::linalg_vector_norm"))
_POSITIONS = frozenset(f"aten::{n}" for n in ("argmax", "argmin", "max", "min", "median"))


def _last_dims_norm(name: str) -> Callable[[OnKept, Call], Any]:
    def handle(run: OnKept, call: Call) -> Any:
        source: Tensor = call.arg("input")
        lead = source.dim() - len(call.arg("normalized_shape"))
        kept = run.kept(call, source, range(lead, source.dim()))
        if not kept:
            return None
        cut = _cut(source, kept)
        changed: dict[str, Any] = {"input": cut, "normalized_shape": list(cut.shape[lead:])}
        for affine in ("weight", "bias"):
            if call.before.get(affine) is not None:
                own = {d - lead: index for d, index in kept.items()}
                changed[affine] = _cut(call.before[affine], own)
        out = _again(call, **changed)
        several = isinstance(out, (tuple, list))
        result = _put_back(out[0] if several else out, kept, source.shape)
        plain = _again(call)
        run.changed(call, _cut(plain[0] if several else plain, kept), _cut(result, kept), name)
        return (result, *out[1:]) if several else result

    return handle


def _group_norm(run: OnKept, call: Call) -> Any:
    """Of several groups whole ones go, which the others don't see."""
    source: Tensor = call.arg("input")
    kept = run.kept(call, source, [1])
    if not kept or call.arg("group") > 1:
        return None
    changed: dict[str, Any] = {"input": _cut(source, kept), "C": len(kept[1])}
    for affine in ("weight", "bias"):
        if call.before.get(affine) is not None:
            changed[affine] = call.before[affine].index_select(0, kept[1])
    out = _again(call, **changed)
    run.changed(call, _cut(_again(call)[0], kept), out[0], "GroupNorm")
    return (_put_back(out[0], kept, source.shape), *out[1:])


def _batch_norm(run: OnKept, call: Call) -> Any:
    """Only with the batch's own statistics, as in weight standardisation."""
    source: Tensor = call.arg("input")
    kept = run.kept(call, source, [d for d in range(source.dim()) if d != 1])
    if not kept or not in_training(call):
        return None
    plain = _again(call)
    out = call.func(**{**call.before, "input": _cut(source, kept)})
    run.changed(call, _cut(plain[0], kept), out[0], "batch norm over channels in")
    return (_put_back(out[0], kept, source.shape), *out[1:])


def _contraction(**dims: int) -> Callable[[OnKept, Call], Any]:
    """Zeros where the contracted dim of an operand has lost something."""

    def handle(run: OnKept, call: Call) -> Any:
        changed: dict[str, Tensor] = {}
        for name, dim in dims.items():
            source: Tensor = call.arg(name)
            for d, index in run.kept(call, source, [dim]).items():
                gone = torch.ones(source.shape[d], dtype=torch.bool, device=source.device)
                gone[index] = False
                changed[name] = source.index_fill(d, torch.nonzero(gone).reshape(-1), 0)
        if not changed:
            return None
        result = _again(call, **changed)
        if len(changed) == len(dims) > 1:
            name = f"{call.name} of removed channels in"
            run.changed(call, _again(call), result, name)
        return result

    return handle


_HANDLERS: dict[str, Callable[[OnKept, Call], Any]] = {
    "aten::div": _division,
    "aten::mul": _division,
    **dict.fromkeys((*REDUCED, *ALONG), _reduction),
    "aten::native_layer_norm": _last_dims_norm("LayerNorm"),
    "aten::_fused_rms_norm": _last_dims_norm("RMSNorm"),
    "aten::rms_norm": _last_dims_norm("RMSNorm"),
    "aten::native_group_norm": _group_norm,
    **{
        f"aten::{n}": _batch_norm
        for n in (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_batch_norm_with_update",
            "batch_norm",
            "cudnn_batch_norm",
        )
    },
    "aten::mm": _contraction(self=-1, mat2=-2),
    "aten::bmm": _contraction(self=-1, mat2=-2),
    "aten::addmm": _contraction(mat1=-1, mat2=-2),
    "aten::baddbmm": _contraction(batch1=-1, batch2=-2),
    "aten::mv": _contraction(self=-1, vec=-1),
    "aten::dot": _contraction(self=-1, tensor=-1),
    "aten::convolution": _contraction(input=1),
}
