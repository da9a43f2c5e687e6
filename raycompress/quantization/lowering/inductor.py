"""Lowering to torch's own compiler (inductor) on x86 CPUs: convolutions and matrices in int8.

The file is a program with int8 weights, which is compiled where it is loaded; nothing beyond torch
is needed but a C++ compiler. There are integer kernels of 1-d and 2-d convolutions and of linear
layers.
"""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycompress.artifacts.export import Inputs
from raycompress.artifacts.pt2 import load_program, save_program, save_pt2
from raycompress.errors import ConfigError
from raycompress.quantization.lowering.compiled import CompiledProgram
from raycompress.quantization.lowering.graph import integer_program
from raycompress.quantization.lowering.lowered import Lowered
from raycompress.quantization.quantizer import Quantization

__all__ = ["check", "load_inductor", "lower"]


def check() -> None:
    """Raises a ConfigError where inductor has no integer kernels, or can't compile."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise ConfigError(
            "lowering to inductor needs an x86 CPU, for which it has integer kernels; this one is "
            f"{platform.machine()}. lower: onnx runs here"
        )
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise ConfigError("lowering to inductor needs oneDNN, which this build of torch lacks")
    from torch._inductor import config, exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        wanted = " and ".join(name for name in config.cpp.cxx if name)
        raise ConfigError(
            f"lowering to inductor needs a C++ compiler: there is no {wanted} here. Install g++ "
            "(Debian: apt install g++), or set CXX to another compiler, before the job starts"
        ) from error
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise ConfigError(
            f"lowering to inductor needs Python's headers: there is no {header} (Debian: apt "
            "install python3-dev)"
        )


def lower(
    model: nn.Module,
    float_model: nn.Module | None,
    example_inputs: tuple[Any, ...],
    folder: Path,
    feed: Callable[[nn.Module], object],
    how: Quantization | None = None,
) -> Lowered:
    """Writes `quantized.pt2` and, of the float model, `float.pt2`, and compiles both.

    Raises:
        ConfigError: The model isn't quantized to 8 bits by scales and zero points.
        TaskError: A quantizer has no range, or `feed` ran nothing.
        StructureError: The model can't run on the example inputs.
        ArtifactError: It can't be exported, or compiled.
        VerificationError: Fewer layers run in integers than were asked for, or the compiled program
            computes something else.
    """
    del how  # the layers say it all
    made = integer_program(model, example_inputs, feed, int32_bias=False)
    path, reference = folder / "quantized.pt2", folder / "float.pt2"
    name, traced = type(model).__name__, made.program.module()
    save_program(made.program, made.inputs, path, traced, name=name, reason=made.reason)
    if float_model is not None:
        save_pt2(float_model, example_inputs, reference)
    runs = CompiledProgram(load_program(path))
    lowered = Lowered(
        backend="inductor",
        model=runs,
        reference=None if float_model is None else CompiledProgram(load_program(reference)),
        path=path,
        file_bytes=path.stat().st_size,
        reference_bytes=0 if float_model is None else reference.stat().st_size,
        layers_asked=made.layers,
        layers_integer=runs.layers,
        fixed_batch=made.reason,
    )
    lowered.check()
    made.compare(runs, "inductor")
    if not made.reason:
        Inputs.of(example_inputs).resized(1).call(runs)
    return lowered


def load_inductor(path: str | Path) -> nn.Module:
    """Loads `quantized.pt2`, to be compiled at its first call.

    `raycompress.load` loads it too, and computes the same in float, slower.

    Raises:
        ConfigError: There is no C++ compiler, or another CPU than x86.
        ArtifactError: The file is damaged, or would run other code.
    """
    check()
    return CompiledProgram(load_program(path))
