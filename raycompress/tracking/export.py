"""What a model needs before it is exported, and the check of what came out; knows no MLflow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from raycompress.errors import RaycompressError, VerificationError
from raycompress.weights import Weights, digest_of_state

__all__ = ["batched", "check_loaded", "digest", "outputs_of", "portable"]


def portable(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode; the caller's model stays as it is."""
    return copy.deepcopy(model).cpu().eval()


def batched(inputs: Sequence[Any], size: int) -> tuple[Tensor, ...]:
    """The inputs with `size` examples, repeated or cut along the first dim.

    Raises:
        RaycompressError: An input is no tensor, or has no first dim; such models have no batch.
    """
    for value in inputs:
        if not isinstance(value, Tensor) or not value.dim():
            raise RaycompressError(
                "only models whose inputs are all tensors of examples can be exported, got "
                f"{type(value).__name__}"
            )
    return tuple(
        v.detach().cpu().repeat(-(-size // max(v.shape[0], 1)), *[1] * (v.dim() - 1))[:size]
        for v in inputs
    )


def outputs_of(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All tensors that the model answers."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def digest(model: nn.Module) -> str:
    """Of class and weights, by which a model that was kept before is found."""
    return f"{type(model).__qualname__}:{digest_of_state(Weights(model.state_dict(), {}))}"


def check_loaded(model: nn.Module, loaded: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Compares a loaded model with the one that was exported, at another batch size.

    Raises:
        VerificationError: It doesn't run there, or answers something else.
    """
    size = inputs[0].shape[0] + 3
    other = batched(inputs, size)
    try:
        expected = outputs_of(model, other)
    except Exception:  # the user's own model takes no other batch size
        other = tuple(inputs)
        expected = outputs_of(model, other)
    try:
        got = outputs_of(loaded, other)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VerificationError(
            f"the exported model doesn't run with {len(other[0])} examples ({reason}); does the "
            "model's forward depend on the batch size?"
        ) from error
    for a, b in zip(expected, got, strict=True):
        scale = float(a.double().abs().max()) if a.numel() else 0.0
        error_ = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        if a.shape != b.shape or not error_ <= 1e-4 * max(scale, 1e-6):
            raise VerificationError(
                f"the exported model differs from the slim one by {error_:.1e} "
                f"(outputs are up to {scale:.1e})"
            )
