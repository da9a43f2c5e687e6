"""Quantized models as files, and on runtimes that compute in integers."""

from __future__ import annotations

import importlib
from typing import cast

from raycompress.errors import ConfigError
from raycompress.quantization.lowering.lowered import Lower, Lowered
from raycompress.wording import near

__all__ = ["BACKENDS", "INTEGERS", "Lower", "Lowered", "lowering"]

BACKENDS: dict[str, str] = {
    "onnx": "raycompress.quantization.lowering.onnx",
    "inductor": "raycompress.quantization.lowering.inductor",
    "packed": "raycompress.quantization.lowering.packing",
}
"""Backend -> module with `lower`, a `Lower`, and `check()`, which raises a ConfigError without it.

Modules, since each imports a runtime that is only there if it was asked for.
"""

INTEGERS = ("onnx", "inductor")
"""Those that compute in integers: in 8 bits, and in no other number of them."""


def lowering(backend: str, key: str = "lower") -> Lower:
    """The function that lowers to a backend.

    Args:
        backend: Its name.
        key: Of the job, for messages.

    Raises:
        ConfigError: There is no such backend, or what it needs isn't on this machine.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"{key} must be one of {', '.join((*BACKENDS, 'none'))}, got {backend!r}"
            f"{near(backend, BACKENDS)}"
        )
    module = importlib.import_module(BACKENDS[backend])
    module.check()
    return cast(Lower, module.lower)
