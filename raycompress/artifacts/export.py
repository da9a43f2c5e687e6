"""What all exports share: example inputs at any batch size, and the check of what was written."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from raycompress.errors import ArtifactError, VerificationError

__all__ = ["ExampleInputs", "Inputs", "Saved", "compare", "exported", "first_line", "portable"]

ExampleInputs = tuple[Any, ...] | Mapping[str, Any] | Tensor


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        path: the file.
        dynamic_batch: whether it takes any batch size.
        reason: why the batch size is fixed, "" if it isn't.
    """

    path: Path
    dynamic_batch: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Inputs:
    """Arguments of a call, on the CPU.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        batch: number of examples, the first size of the first tensor; None without any.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int | None

    @staticmethod
    def of(example_inputs: ExampleInputs) -> Inputs:
        """From one tensor, a tuple of positional or a mapping of keyword arguments."""
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(example_inputs, Mapping):
            kwargs = dict(example_inputs)
        else:
            args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        args, kwargs = tree_map(
            lambda v: v.detach().cpu() if isinstance(v, Tensor) else v, (tuple(args), kwargs)
        )
        sizes = [v.shape[0] for v in tree_leaves((args, kwargs)) if _has_batch(v)]
        return Inputs(args, kwargs, sizes[0] if sizes else None)

    def resized(self, batch: int) -> Inputs:
        """With another number of examples, repeated or cut; other inputs stay as they are."""

        def resize(value: Any) -> Any:
            if not self.is_batched(value):
                return value
            times = -(-batch // max(self.batch or 1, 1))
            return value.repeat(times, *[1] * (value.dim() - 1))[:batch].clone()

        args, kwargs = tree_map(resize, (self.args, self.kwargs))
        return Inputs(args, kwargs, batch)

    def is_batched(self, value: Any) -> bool:
        """Whether a value holds one entry for each example."""
        return _has_batch(value) and value.shape[0] == self.batch

    def call(self, function: Callable[..., Any]) -> list[Tensor]:
        """All tensors that a model answers."""
        with torch.no_grad():
            answer = function(*self.args, **self.kwargs)
        return [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]


def _has_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def portable(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode; the caller's model stays as it is."""
    return copy.deepcopy(model).cpu().eval()


def first_line(error: Exception) -> str:
    """What an exporter says, without its traces."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def exported(model: nn.Module, inputs: Inputs) -> tuple[torch.export.ExportedProgram, Inputs, str]:
    """The model as a program of any batch size, or else of that of the inputs.

    Returns:
        The program, the inputs that it was traced with, and why the batch size is fixed ("").

    Raises:
        ArtifactError: torch.export can't export it.
    """
    reason = "no input is a tensor with a batch dim"
    if inputs.batch is not None:
        # torch takes a size of 0 or 1 for a constant.
        several = inputs.resized(max(2, inputs.batch))
        free = {0: torch.export.Dim.DYNAMIC}
        try:
            with _named_keywords(model, several):
                bound = inspect.signature(model.forward).bind(*several.args, **several.kwargs)
                shapes = tree_map(
                    lambda v: free if several.is_batched(v) else None, bound.arguments
                )
                program = torch.export.export(
                    model, several.args, several.kwargs, dynamic_shapes=shapes
                )
            return program, several, ""
        except Exception as error:  # whatever the model's own code raises
            reason = first_line(error)
    try:
        return torch.export.export(model, inputs.args, inputs.kwargs), inputs, reason
    except Exception as error:
        raise ArtifactError(
            f"torch.export can't export {type(model).__name__}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


@contextmanager
def _named_keywords(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Names the keywords that a `forward(**inputs)` is called with: torch 2.13 wants names."""
    forward = model.forward
    signature = inspect.signature(forward)
    named = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    extra = [name for name in inputs.kwargs if name not in signature.parameters]
    if not extra:
        yield
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    # Functions have this attribute only once it is set, which mypy doesn't know.
    call.__signature__ = signature.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
    model.forward = call
    try:
        yield
    finally:
        model.forward = forward


def compare(
    model: nn.Module, loaded: Callable[..., Any], inputs: Inputs, *, dynamic_batch: bool
) -> None:
    """Compares what was loaded with the model, at another batch size where both take any.

    Raises:
        VerificationError: it doesn't run there, or answers something else.
    """
    if dynamic_batch and inputs.batch is not None:
        other = inputs.resized(inputs.batch + 3)
        try:
            expected, inputs = other.call(model), other
        except Exception:  # the user's own model takes no other batch size
            expected = inputs.call(model)
    else:
        expected = inputs.call(model)
    try:
        got = inputs.call(loaded)
    except Exception as error:
        raise VerificationError(
            f"the exported model doesn't run with {inputs.batch} examples ({first_line(error)}); "
            "does the model's forward depend on the batch size?"
        ) from error
    if [t.shape for t in got] != [t.shape for t in expected]:
        raise VerificationError(
            f"the exported model answers shapes {[tuple(t.shape) for t in got]}, not "
            f"{[tuple(t.shape) for t in expected]}"
        )
    for a, b in zip(expected, got, strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        error_ = float((a.double() - b.double()).abs().masked_fill(same, 0).max()) if len(a) else 0
        finite = a.double()[a.isfinite()].abs()
        scale = float(finite.max()) if len(finite) else 0.0
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        if not error_ <= max(1e-4, 4 * eps) * max(scale, 1e-6):
            raise VerificationError(
                f"the exported model differs from the slim one by {error_:.1e} "
                f"(outputs are up to {scale:.1e})"
            )
