"""Does the slim model compute what the masked one does?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raycompress.structure.model import ChannelGroup, Structure

__all__ = ["Verdict", "verify"]


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison.

    Attributes:
        kind: "exact"; "inexact": differs, and operations across pruned channels explain why;
            "wrong": differs without an explanation, or one of the models doesn't run.
        max_error: largest absolute difference, relative to the largest absolute output.
        reasons: the operations across channels, or what is wrong.
    """

    kind: Literal["exact", "inexact", "wrong"]
    max_error: float
    reasons: tuple[str, ...] = ()


def verify(
    masked: nn.Module,
    slim: nn.Module,
    inputs: tuple[Any, ...] | Mapping[str, Any] | Tensor,
    *,
    structure: Structure | None = None,
    dtype: torch.dtype | None = None,
) -> Verdict:
    """Compares the outputs of both models in evaluation mode.

    Args:
        masked: the dense model with zeros in place of what was removed.
        slim: the slim model.
        inputs: positional arguments (a tuple, or one tensor), or keyword arguments (a mapping).
        structure: of the dense model; without it no difference can be explained.
        dtype: compare copies in this type; `torch.float64` separates rounding from mistakes.
    """
    try:
        expected, got = (_run(m, inputs, dtype) for m in (masked, slim))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        return Verdict("wrong", float("inf"), (f"doesn't run: {type(error).__name__}: {error}",))
    if [t.shape for t in expected] != [t.shape for t in got]:
        shapes = [tuple(t.shape) for t in got], [tuple(t.shape) for t in expected]
        return Verdict("wrong", float("inf"), (f"output shapes are {shapes[0]}, not {shapes[1]}",))
    worst = max((_error(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)
    used = next((t.dtype for t in expected if t.is_floating_point()), torch.float32)
    tolerance = 1e-8 if used == torch.float64 else 1e-4 if used == torch.float32 else 2e-2
    if worst <= tolerance:
        return Verdict("exact", worst)
    groups = structure.groups if structure is not None else ()
    reasons = tuple(
        dict.fromkeys(g.reason for g in groups if not g.exact and _lost(g, masked, slim))
    )
    return Verdict("inexact" if reasons else "wrong", worst, reasons)


def _lost(group: ChannelGroup, masked: nn.Module, slim: nn.Module) -> bool:
    """Whether the group lost channels; a norm over channels that are all there explains nothing."""
    before, after = (
        dict(model.named_parameters(remove_duplicate=False)) for model in (masked, slim)
    )
    return any(
        before[m.parameter].shape[m.dim] != after[m.parameter].shape[m.dim]
        for m in group.members
        if m.parameter in before and m.parameter in after
    )


def _error(expected: Tensor, got: Tensor) -> float:
    """Largest difference relative to the output's scale; infinite where an output is NaN."""
    if not expected.numel():
        return 0.0
    a, b = expected.double(), got.double()
    if bool(a.isnan().any()) or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")  # NaN would hide any difference
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    difference = float((a - b).abs().max())
    return difference / max(float(a.abs().max()), 1e-12) if difference else 0.0


def _run(
    model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any] | Tensor, dtype: Any
) -> list[Tensor]:
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
        inputs = _cast(inputs, dtype)
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            if isinstance(inputs, Mapping):
                return _tensors(model(**inputs))
            return _tensors(model(*(inputs if isinstance(inputs, tuple) else (inputs,))))
    finally:
        for module, training in modes.items():
            module.training = training


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _cast(v, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        return [t for v in out.values() for t in _tensors(v)]
    if isinstance(out, (list, tuple)):
        return [t for v in out for t in _tensors(v)]
    return []
