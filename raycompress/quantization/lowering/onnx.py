"""Quantized models as ONNX in QDQ form, on onnxruntime's integer kernels; needs the extra `onnx`.

The file holds int8 weights, int32 biases, and the scales and zero points that were trained, between
QuantizeLinear and DequantizeLinear nodes. Any runtime can run it; onnxruntime makes QLinearConv and
QGemm of it. Before AVX512-VNNI, x86 multiplies pairs of int8 with saturation at 16 bits, so that
there answers may be off where weights are large: lowering compares them, and fails.

Between quantized neighbours, onnxruntime by itself rounds the weight of a layer that is to stay in
float, with one scale for all of it (its WeightBiasQuantization). It does so where the input has one
scale, so these layers are given inputs with a scale for each channel, all equal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from raycompress.artifacts.export import Inputs
from raycompress.artifacts.onnx import OnnxModel, check_onnx, save_onnx, write_onnx
from raycompress.errors import ArtifactError, ConfigError, VerificationError
from raycompress.quantization.lowering.graph import IntegerProgram, integer_program
from raycompress.quantization.lowering.lowered import Lowered
from raycompress.quantization.quantizer import Quantization

__all__ = ["check", "lower"]

_INTEGER = {
    *("QLinearConv", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"),
    *("QLinearMatMul", "DynamicQuantizeMatMul"),
}
_ROUNDED_UNASKED = {"Conv", "ConvTranspose", "Gemm"}
# onnxruntime moves what dequantizes behind them.
_MOVES = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice"}


def check() -> None:
    """Raises a ConfigError without the extra `onnx`."""
    try:
        check_onnx("lowering to onnx")
    except ArtifactError as error:
        raise ConfigError(str(error)) from error


def lower(
    model: nn.Module,
    float_model: nn.Module | None,
    example_inputs: tuple[Any, ...],
    folder: Path,
    feed: Callable[[nn.Module], object],
    how: Quantization | None = None,
) -> Lowered:
    """Writes `quantized.onnx` and, of the float model, `float.onnx`, and runs both on onnxruntime.

    Raises:
        ConfigError: The model isn't quantized to 8 bits by scales and zero points.
        TaskError: A quantizer has no range, or `feed` ran nothing.
        StructureError: The model can't run on the example inputs.
        ArtifactError: It can't be exported.
        VerificationError: Fewer or other layers run in integers than were asked for, or onnxruntime
            computes something else.
    """
    made = integer_program(model, example_inputs, feed, int32_bias=True)
    path, reference = folder / "quantized.onnx", folder / "float.onnx"
    write_onnx(made.program, made.inputs, path)
    _keep_in_float(path)
    spec = made.program.call_spec.out_spec
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch, "optimized.onnx")
        runs = OnnxModel(path, spec, optimized)
        integer = _integer_layers(optimized, made)
    made.compare(runs, "onnxruntime")
    if float_model is not None:
        save_onnx(float_model, Inputs.of(example_inputs).args, reference)
    lowered = Lowered(
        backend="onnx",
        model=runs,
        reference=None if float_model is None else OnnxModel(reference, spec),
        path=path,
        file_bytes=path.stat().st_size,
        reference_bytes=0 if float_model is None else reference.stat().st_size,
        layers_asked=made.layers,
        layers_integer=integer,
        fixed_batch=made.reason,
    )
    lowered.check()
    return lowered


def _integer_layers(optimized: Path, made: IntegerProgram) -> tuple[str, ...]:
    """Layers whose int8 weights integer kernels read, and nothing else, in the graph that runs.

    Raises:
        VerificationError: Other layers run in integers as well.
    """
    graph = import_module("onnx").load(optimized, load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, set()).add(node.op_type)
        if node.op_type in ("QLinearConv", "QGemm") and not node.input[3].endswith(".weight"):
            raise VerificationError(
                f"onnxruntime computes {node.name} in integers, which is to stay in float"
            )
    return tuple(
        name
        for name in made.layers
        if f"{name}.weight" in readers and readers[f"{name}.weight"] <= _INTEGER
    )


def _keep_in_float(path: Path) -> None:
    """Has what layers with float weights read, in a file, dequantized with a scale per channel."""
    onnx = import_module("onnx")
    model = onnx.load(path, load_external_data=False)
    constants = {each.name: each for each in model.graph.initializer}
    makers = {value: node for node in model.graph.node for value in node.output}
    nodes = []
    for node in model.graph.node:
        if node.op_type in _ROUNDED_UNASKED and node.input[1] in constants:
            maker = makers.get(node.input[0])
            moved = maker is not None and maker.op_type in _MOVES
            while maker is not None and maker.op_type in _MOVES:
                maker = makers.get(maker.input[0])
            if maker is not None and maker.op_type == "DequantizeLinear":
                integers, ends, name = maker.input[0], list(maker.input[1:]), f"{node.name}.input"
                if moved:  # what moves integers goes on moving integers
                    given, integers = [node.input[0], *ends], f"{name}.integers"
                    nodes.append(onnx.helper.make_node("QuantizeLinear", given, [integers]))
                scale, zero = (onnx.numpy_helper.to_array(constants[end]) for end in ends)
                channels = _channels(node, constants[node.input[1]].dims)
                made, values = _dequantized(onnx, name, integers, scale, zero, channels)
                nodes += made
                model.graph.initializer.extend(values)
                node.input[0] = name
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def _dequantized(
    onnx: Any, name: str, integers: str, scale: Any, zero: Any, channels: int
) -> tuple[list[Any], list[Any]]:
    """Nodes and constants that make `name` of integers, without one scale for all channels."""
    make, constant = onnx.helper.make_node, onnx.numpy_helper.from_array
    ends = [f"{name}.scale", f"{name}.zero_point"]
    if channels > 1:
        each = zip((np.full(channels, scale), np.full(channels, zero)), ends, strict=True)
        return (
            [make("DequantizeLinear", [integers, *ends], [name], axis=1)],
            [constant(values, end) for values, end in each],
        )
    # A scale for each channel would be one for all.
    steps = [f"{name}.float", f"{name}.steps"]
    return (
        [
            make("Cast", [integers], [steps[0]], to=onnx.TensorProto.FLOAT),
            make("Sub", [steps[0], ends[1]], [steps[1]]),
            make("Mul", [steps[1], ends[0]], [name]),
        ],
        [constant(scale, ends[0]), constant(zero.astype(np.float32), ends[1])],
    )


def _channels(node: Any, weight: Sequence[int]) -> int:
    """Of a layer's input."""
    given: dict[str, int] = {each.name: each.i for each in node.attribute}
    if node.op_type == "Conv":
        return weight[1] * given.get("group", 1)
    return weight[1] if given.get("transB") else weight[0]
