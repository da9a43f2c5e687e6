"""Quantized models as ONNX in QDQ form, on onnxruntime's integer kernels; needs the extra `onnx`.

The file holds int8 weights, int32 biases, and the scales and zero points that were trained, between
QuantizeLinear and DequantizeLinear nodes. Any runtime can run it; onnxruntime makes QLinearConv and
QGemm of it. Before AVX512-VNNI, x86 multiplies pairs of int8 with saturation at 16 bits, so that
there answers may be off where weights are large: lowering compares them, and fails.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from raycompress.artifacts.export import Inputs
from raycompress.artifacts.onnx import OnnxModel, check_onnx, save_onnx, write_onnx
from raycompress.errors import ArtifactError, ConfigError
from raycompress.quantization.lowering.graph import IntegerProgram, integer_program
from raycompress.quantization.lowering.lowered import Lowered
from raycompress.quantization.quantizer import Quantization

__all__ = ["check", "lower"]

_INTEGER = {
    *("QLinearConv", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"),
    *("QLinearMatMul", "DynamicQuantizeMatMul"),
}


def check() -> None:
    """Raises a ConfigError without the extra `onnx`."""
    try:
        check_onnx("lowering to onnx")
    except ArtifactError as error:
        raise ConfigError(str(error)) from error


def lower(
    model: nn.Module,
    float_model: nn.Module,
    example_inputs: tuple[Any, ...],
    folder: Path,
    feed: Callable[[nn.Module], object],
    how: Quantization | None = None,
) -> Lowered:
    """Writes `quantized.onnx` and `float.onnx`, and runs both on onnxruntime.

    Raises:
        ConfigError: The model isn't quantized to 8 bits by scales and zero points.
        TaskError: A quantizer has no range, or `feed` ran nothing.
        StructureError: The model can't run on the example inputs.
        ArtifactError: It can't be exported.
        VerificationError: Fewer layers run in integers than were asked for, or onnxruntime computes
            something else.
    """
    made = integer_program(model, example_inputs, feed, int32_bias=True)
    path, reference = folder / "quantized.onnx", folder / "float.onnx"
    write_onnx(made.program, made.inputs, path)
    spec = made.program.call_spec.out_spec
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch, "optimized.onnx")
        runs = OnnxModel(path, spec, optimized)
        integer = _integer_layers(optimized, made)
    made.compare(runs, "onnxruntime")
    save_onnx(float_model, Inputs.of(example_inputs).args, reference)
    lowered = Lowered(
        backend="onnx",
        model=runs,
        reference=OnnxModel(reference, spec),
        path=path,
        file_bytes=path.stat().st_size,
        reference_bytes=reference.stat().st_size,
        layers_asked=made.layers,
        layers_integer=integer,
        fixed_batch=made.reason,
    )
    lowered.check()
    return lowered


def _integer_layers(optimized: Path, made: IntegerProgram) -> tuple[str, ...]:
    """Layers whose int8 weights integer kernels read, and nothing else, in the graph that runs."""
    graph = import_module("onnx").load(optimized, load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, set()).add(node.op_type)
    return tuple(
        name
        for name in made.layers
        if f"{name}.weight" in readers and readers[f"{name}.weight"] <= _INTEGER
    )
