"""What a slim model must compute where operations across channels see the kept channels only.

The masked dense model runs at its full size, with labels beside every tensor (`trace.py`). The
labels of its parameters say which positions of each tensor are gone. An operation that reduces
over such positions (norm, mean, softmax, ...) runs on the kept ones alone, and a contraction reads
zeros there, since f(0) need not be 0. Everything else runs as written: no parameter is cut and no
attribute corrected, so a mistake of `slim` shows as a difference.

An operator with a rule of the user's own also runs as written, and so does arithmetic with sizes
that the code of a module reads: `x.sum(-1) / x.shape[-1]` divides by the dense size here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.labels import LabelSpace, varying
from raycompress.structure.model import Kept, Structure
from raycompress.structure.operators import find_rule
from raycompress.structure.rules_norm import in_training
from raycompress.structure.rules_reduction import ALONG, REDUCED, reduced_dims
from raycompress.structure.trace import Call, Trace, trace

__all__ = ["Reference", "run_on_kept"]

Positions = dict[int, Tensor]  # dim -> kept indices along it


@dataclass(frozen=True)
class Reference:
    """The output of the masked model whose operations across channels see kept channels only.

    Attributes:
        output: what the model returned.
        operations: the operations whose result differs from that over all channels.
    """

    output: Any
    operations: tuple[str, ...]


def run_on_kept(
    masked: nn.Module,
    structure: Structure,
    kept: Kept,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Reference:
    """Runs the masked dense model so that operations across channels see kept channels only.

    Args:
        masked: the dense model with zeros in place of what was removed.
        structure: of the dense model.
        kept: group name -> kept channel indices; groups left out are whole.
        args: positional arguments of the model.
        kwargs: its keyword arguments.

    Raises:
        StructureError: `kept` doesn't fit, the model isn't zero where it says so, or what is
            removed doesn't fit together on these inputs.
    """
    vectors = structure.keep_vectors(kept)
    parameters = dict(masked.named_parameters(remove_duplicate=False))
    for name, mask in structure.masks(kept).items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise StructureError(f"the masked model has no parameter {name!r} of the dense shape")
        if bool(parameters[name].detach()[~mask.to(parameters[name].device)].any()):
            raise StructureError(f"the masked model isn't zero where `kept` says so: {name!r}")
    gone = _Gone(vectors)
    runner = _OnKept(gone)
    seen = trace(masked, args, kwargs, find_rule, runner)
    gone.check(seen)
    return Reference(seen.output, tuple(runner.operations))


class _Gone:
    """Which labels are gone: those of removed indices, and conjunctions of such alone."""

    def __init__(self, keep: dict[tuple[str, int], NDArray[np.bool_]]) -> None:
        self._keep = keep
        self._flags = np.zeros(1, dtype=np.bool_)
        self._read: set[int] = set()
        self._conjunctions = 0

    def update(self, tracer: Trace) -> NDArray[np.bool_]:
        """One flag for each label that the trace has made so far, shape (labels,)."""
        space = tracer.space
        if len(self._flags) == space.count:
            return self._flags
        self._flags = np.concatenate(
            [self._flags, np.zeros(space.count - len(self._flags), dtype=np.bool_)]
        )
        for number, leaf in enumerate(tracer.leaves):
            if leaf.facets is None or number in self._read:
                continue
            self._read.add(number)
            for dim, start in enumerate(leaf.starts):
                keep = self._keep.get((leaf.name, dim))
                if start and keep is not None:
                    self._flags[start : start + len(keep)] = ~keep
        for c in space.conjunctions[self._conjunctions :]:
            self._flags[c.ids] = self._flags[c.children].all(axis=1)
        self._conjunctions = len(space.conjunctions)
        return self._flags

    def kept(self, tracer: Trace, tensor: Tensor) -> Positions:
        """Kept indices along each dim of a tensor that has lost something."""
        flags = self.update(tracer)
        found: Positions = {}
        for facet in tracer.facets(tensor):
            gone = torch.from_numpy(flags[facet.numpy()])
            if not gone.any():
                continue
            union = torch.zeros_like(gone)
            for dim in varying(facet):
                others = tuple(d for d in range(gone.dim()) if d != dim)
                line = gone.all(dim=others) if others else gone
                if line.any():
                    shape = [1] * gone.dim()
                    shape[dim] = -1
                    union |= line.reshape(shape)
                    before = found.get(dim)
                    index = torch.nonzero(~line).reshape(-1)
                    if before is not None:
                        index = index[torch.isin(index, before)]
                    found[dim] = index
            if not torch.equal(union, gone):
                raise StructureError("what is removed leaves a tensor that isn't rectangular")
        return {d: index.to(tensor.device) for d, index in found.items()}

    def check(self, tracer: Trace) -> None:
        """What must go together went together, and what can't be removed is there.

        Raises:
            StructureError: otherwise.
        """
        flags = self.update(tracer)
        space: LabelSpace = tracer.space
        for a, b in space.edges:
            if (flags[a] != flags[b]).any():
                raise StructureError("a removed channel meets one that is kept")
        for ids, reason in space.frozen:
            if flags[ids].any():
                raise StructureError(f"something was removed that can't be: {reason}")


class _OnKept:
    """Runs each operator of a trace: those across channels on the kept positions alone."""

    def __init__(self, gone: _Gone) -> None:
        self._gone = gone
        self.operations: dict[str, None] = {}

    def __call__(self, call: Call) -> Any:
        handle = _HANDLERS.get(call.name)
        result = None if handle is None else handle(self, call)
        return call.func(*call.args, **call.kwargs) if result is None else result

    def kept(self, call: Call, tensor: Tensor, dims: Any) -> Positions:
        """Kept indices along those of the dims that have lost something."""
        if not tensor.dim():
            return {}
        found = self._gone.kept(call.tracer, tensor)
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


def _reduction(run: _OnKept, call: Call) -> Any:
    source: Tensor = call.arg("self")
    kept = run.kept(call, source, reduced_dims(call, source.dim()))
    if not kept:
        return None
    if call.name in ("aten::nonzero", "aten::_unique2") or call.has("out"):
        raise StructureError(f"{call.name} over removed channels has no reference")
    result = _again(call, self=_cut(source, kept))
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
    return result


_POSITIONS = frozenset(f"aten::{n}" for n in ("argmax", "argmin", "max", "min", "median"))


def _last_dims_norm(name: str) -> Callable[[_OnKept, Call], Any]:
    def handle(run: _OnKept, call: Call) -> Any:
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


def _group_norm(run: _OnKept, call: Call) -> Any:
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


def _batch_norm(run: _OnKept, call: Call) -> Any:
    """Only with the batch's own statistics, as in weight standardisation."""
    source: Tensor = call.arg("input")
    kept = run.kept(call, source, [d for d in range(source.dim()) if d != 1])
    if not kept or not in_training(call):
        return None
    plain = _again(call)
    out = call.func(**{**call.before, "input": _cut(source, kept)})
    run.changed(call, _cut(plain[0], kept), out[0], "batch norm over channels in")
    return (_put_back(out[0], kept, source.shape), *out[1:])


def _contraction(**dims: int) -> Callable[[_OnKept, Call], Any]:
    """Zeros where the contracted dim of an operand has lost something."""

    def handle(run: _OnKept, call: Call) -> Any:
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


_HANDLERS: dict[str, Callable[[_OnKept, Call], Any]] = {
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
