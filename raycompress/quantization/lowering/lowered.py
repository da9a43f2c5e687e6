"""What lowering returns: a model that computes in integers, and what of it really does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from raycompress.errors import VerificationError
from raycompress.quantization.quantizer import Quantization

__all__ = ["Lower", "Lowered", "check_integers"]


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A quantized model on a runtime.

    Attributes:
        backend: Which one.
        model: Called as the float model is; runs on the CPU.
        reference: The float model on the same runtime, for its latency; called alike. None: it
            wasn't given.
        path: The file.
        file_bytes: Its size.
        reference_bytes: That of the float model's file in the same format.
        layers_asked: Quantized layers with bits for weight and input, by name.
        layers_integer: Those that really run in integers.
        fixed_batch: Why it takes batches of one size alone, "" if it takes any.
        runs: "integers", or "simulation": the file is small, the arithmetic is in float.
    """

    backend: str
    model: nn.Module
    reference: nn.Module | None
    path: Path
    file_bytes: int
    reference_bytes: int
    layers_asked: tuple[str, ...]
    layers_integer: tuple[str, ...]
    fixed_batch: str = ""
    runs: Literal["integers", "simulation"] = "integers"

    def check(self) -> None:
        """Raises a VerificationError if fewer layers run in integers than were asked for."""
        if self.runs == "integers":
            check_integers(self.backend, self.layers_asked, self.layers_integer)


def check_integers(backend: str, asked: Collection[str], integer: Collection[str]) -> None:
    """Raises a VerificationError, which names layers, if fewer run in integers than were asked."""
    missing = [name for name in asked if name not in integer]
    if missing:
        raise VerificationError(
            f"{backend}: {len(asked) - len(missing)} of {len(asked)} layers run in integers; in "
            f"float are {', '.join(missing[:5])}"
        )


Lower = Callable[
    [
        nn.Module,
        nn.Module | None,
        tuple[object, ...],
        Path,
        Callable[[nn.Module], object],
        Quantization,
    ],
    Lowered,
]
"""`lower(model, float_model, example_inputs, folder, feed, how)`.

`model` is prepared, has its ranges, and is in eval mode on the CPU; `float_model` is what it was
made of, or, for backends that compute in integers, None where nothing is to be compared with it.
Neither is changed. Files go to `folder`, which is there. `feed(model)` runs a model on calibration
data, as `for batch in batches: task.forward(model, batch)`: outputs that are rounded only once they
are lowered take their ranges from it. `how` is what it was prepared with.
"""
