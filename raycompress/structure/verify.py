"""Does the slim model compute what the masked one does?

Equality is the rule. Where operations across channels (LayerNorm, softmax, ...) make it impossible,
the slim model must equal an independent reference: the masked dense model whose operations across
channels see the kept channels only (`reference.py`). So a verdict is never an excuse: a mistake of
the surgery behind a LayerNorm is found there as anywhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.model import Kept, Structure
from raycompress.structure.reference import run_on_kept

__all__ = ["Verdict", "verify"]

Inputs = tuple[Any, ...] | Mapping[str, Any] | Tensor


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison.

    Attributes:
        kind: "exact": equal; "inexact": differs from the masked model because operations across
            channels no longer see the removed ones, and equals the masked model whose operations
            don't see them either; "wrong": anything else.
        max_error: largest absolute difference from the masked model, relative to the largest
            absolute output.
        reasons: the operations across channels, or what is wrong.
        reference_error: the same figure against the masked model whose operations across channels
            see the kept channels only; None where it wasn't needed or can't be run.
    """

    kind: Literal["exact", "inexact", "wrong"]
    max_error: float
    reasons: tuple[str, ...] = ()
    reference_error: float | None = None


def verify(
    masked: nn.Module,
    slim: nn.Module,
    inputs: Inputs,
    *,
    structure: Structure | None = None,
    kept: Kept | None = None,
    dtype: torch.dtype | None = None,
) -> Verdict:
    """Compares the outputs of both models in evaluation mode.

    Outputs count as equal within 1e-8 of their scale in float64, 1e-4 in float32 and 2e-2 in
    shorter types. What hardly shows in the outputs isn't seen: behind a layer scale of 1e-6 a
    mistake is smaller than float32's tolerance; behind a gain of zero, or in units that none of
    the inputs wakes, it is nothing. Use `dtype=torch.float64`, and several inputs.

    Args:
        masked: the dense model with zeros in place of what was removed.
        slim: the slim model.
        inputs: positional arguments (a tuple, or one tensor), or keyword arguments (a mapping).
        structure: of the dense model.
        kept: group name -> kept channel indices, as `slim` got them. Without `structure` and
            `kept` no difference can be explained.
        dtype: compare copies in this type; `torch.float64` separates rounding from mistakes.

    Raises:
        StructureError: `kept` doesn't fit the structure.
    """
    if structure is not None and kept is not None:
        structure.indices(kept)
    if dtype is not None:
        masked, slim = (copy.deepcopy(m).to(dtype) for m in (masked, slim))
    outputs = []
    for name, model in (("masked", masked), ("slim", slim)):
        try:
            outputs.append(_run(model, inputs, dtype))
        except Exception as problem:  # whatever foreign code raises: it doesn't run
            text = f"the {name} model doesn't run: {type(problem).__name__}: {problem}"
            return Verdict("wrong", float("inf"), (text,))
    expected, got = outputs
    if [t.shape for t in expected] != [t.shape for t in got]:
        shapes = [tuple(t.shape) for t in got], [tuple(t.shape) for t in expected]
        return Verdict("wrong", float("inf"), (f"output shapes are {shapes[0]}, not {shapes[1]}",))
    if not any(t.numel() for t in expected):
        return Verdict("wrong", float("inf"), ("the outputs hold no values to compare",))
    error = _largest(expected, got)
    tolerance = _tolerance(expected)
    if error <= tolerance:
        return Verdict("exact", error)
    if structure is None or kept is None:
        text = "differs from the masked model; without `structure` and `kept` nothing explains it"
        return Verdict("wrong", error, (text,))
    return _explained(masked, got, error, tolerance, structure, kept, _arguments(inputs, dtype))


def _explained(
    masked: nn.Module,
    got: list[Tensor],
    error: float,
    tolerance: float,
    structure: Structure,
    kept: Kept,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
) -> Verdict:
    """Compares with the masked model whose operations across channels see kept channels only."""
    try:
        with _same_noise():
            reference = run_on_kept(masked, structure, kept, *arguments)
        apart = _largest(_tensors(reference.output), got)
        if apart > tolerance and reference.divides:
            # A mean written by hand, whose code reads the number of channels from the shape.
            with _same_noise():
                reference = run_on_kept(masked, structure, kept, *arguments, by_kept=True)
            apart = _largest(_tensors(reference.output), got)
    except StructureError as problem:
        return Verdict("wrong", error, (str(problem),))
    except Exception as problem:  # from the model's code or an operator
        text = f"the reference doesn't run: {type(problem).__name__}: {problem}"
        return Verdict("wrong", error, (text,))
    if not reference.operations:
        return Verdict("wrong", error, ("no operation across channels explains it",), apart)
    if apart <= tolerance:
        return Verdict("inexact", error, reference.operations, apart)
    text = (
        f"differs by {apart:.2g} from the masked model whose operations across channels see kept "
        "channels only"
    )
    return Verdict("wrong", error, (text,), apart)


def _tolerance(outputs: list[Tensor]) -> float:
    used = next((t.dtype for t in outputs if t.is_floating_point()), torch.float32)
    return 1e-8 if used == torch.float64 else 1e-4 if used == torch.float32 else 2e-2


def _largest(expected: list[Tensor], got: list[Tensor]) -> float:
    return max((_error(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)


def _error(expected: Tensor, got: Tensor) -> float:
    """Largest difference relative to the output's scale; infinite where an output is NaN."""
    if not expected.numel():
        return 0.0
    if expected.is_complex():
        expected, got = torch.view_as_real(expected), torch.view_as_real(got)
    a, b = expected.double(), got.double()
    if bool(a.isnan().any()) or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")  # NaN would hide any difference
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    difference = float((a - b).abs().max())
    return difference / max(float(a.abs().max()), 1e-12) if difference else 0.0


def _run(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> list[Tensor]:
    args, kwargs = _arguments(inputs, dtype)
    modes = {m: m.training for m in model.modules()}
    if any(modes.values()):  # an exported program is in evaluation mode, and refuses `eval`
        model.eval()
    try:
        with torch.inference_mode(), _same_noise():
            return _tensors(model(*args, **kwargs))
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _same_noise() -> Iterator[None]:
    """Models that draw random numbers draw the same ones; the caller's state stays."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def _arguments(inputs: Inputs, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one run; a model that writes to its inputs writes to copies."""
    copied = _copied(inputs, dtype)
    if isinstance(copied, Mapping):
        return (), dict(copied)
    return copied if isinstance(copied, tuple) else (copied,), {}


def _copied(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        cast = dtype is not None and value.is_floating_point()
        return value.detach().to(dtype, copy=True) if cast else value.detach().clone()
    if isinstance(value, Mapping):
        return {k: _copied(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(v, dtype) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v, dtype) for v in value)
    return value


def _tensors(out: Any) -> list[Tensor]:
    """Tensors in any nesting of containers; objects are searched by their attributes."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        return [t for v in out.values() for t in _tensors(v)]
    if isinstance(out, (list, tuple)):
        return [t for v in out for t in _tensors(v)]
    if hasattr(out, "__dict__") and not isinstance(out, (nn.Module, type)):
        return _tensors(vars(out))
    return []
