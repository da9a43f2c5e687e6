"""The backend "packed": a small file for any number of bits, which runs in simulation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from torch import nn

from raycompress.quantization.lowering.lowered import Lowered
from raycompress.quantization.lowering.packed import load_packed, save_packed
from raycompress.quantization.quantizer import Quantization
from raycompress.structure import file_size

__all__ = ["check", "lower"]


def check() -> None:
    """Nothing is needed beyond raycompress."""


def lower(
    model: nn.Module,
    float_model: nn.Module | None,
    example_inputs: tuple[object, ...],
    folder: Path,
    feed: Callable[[nn.Module], object],
    how: Quantization,
) -> Lowered:
    """Writes `packed.safetensors`; the model is what is loaded from it.

    Raises:
        ArtifactError: The model can't be stored.
    """
    del example_inputs, feed  # nothing is traced, and outputs stay in float
    assert float_model is not None  # it is loaded onto that
    choices = dict(how.choices)
    packed = save_packed(model, folder / "packed.safetensors", how.quantizer, choices)
    loaded = load_packed(packed.path, copy.deepcopy(float_model), how.quantizer)
    return Lowered(
        backend="packed",
        model=loaded.eval(),
        reference=float_model,
        path=packed.path,
        file_bytes=packed.file_bytes,
        reference_bytes=file_size(float_model),
        layers_asked=tuple(name for name, bits in how.choices if bits.weight and bits.input),
        layers_integer=(),
        runs="simulation",
    )
