"""A quantized model as one program: integers in, integers out wherever a kernel can.

A convolution runs in integers only where what it returns is rounded as well. So behind each one
there is a point where values are rounded: to the grid of the layers that read them where there is
one for all, which changes nothing, else to one of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from raycompress.artifacts.export import Inputs, exported
from raycompress.errors import TaskError, VerificationError
from raycompress.quantization.fake_quant import make_grid
from raycompress.quantization.lowering.integer import integer_layers

__all__ = ["IntegerProgram", "integer_program"]

_ATEN, _QUANTIZED = torch.ops.aten, torch.ops.quantized_decomposed
_CONVOLUTIONS = {_ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d}
_CLAMPS = {_ATEN.relu, _ATEN.hardtanh, _ATEN.clamp, _ATEN.relu6}
# Rounding before them or after them is the same.
_MOVES = {
    *(_ATEN.max_pool1d, _ATEN.max_pool2d, _ATEN.max_pool3d, _ATEN.relu, _ATEN.cat),
    *(_ATEN.flatten, _ATEN.view, _ATEN.reshape, _ATEN.unflatten, _ATEN.permute, _ATEN.transpose),
    *(_ATEN.squeeze, _ATEN.unsqueeze, _ATEN.contiguous, _ATEN.clone, _ATEN.dropout, _ATEN.alias),
    *(_ATEN.slice, _ATEN.select, _ATEN.expand, _ATEN.t, _ATEN.pixel_shuffle, _ATEN.detach),
    *(_ATEN.channel_shuffle, _ATEN.upsample_nearest2d, _ATEN.pixel_unshuffle, _ATEN.flip),
}
_TOLERANCE = 0.01
_Params = tuple[float, int]  # scale and zero point of uint8


@dataclass(frozen=True)
class IntegerProgram:
    """A model as a program.

    Attributes:
        program: With nodes that quantize and dequantize; the weights are int8 buffers, which have
            the layers' names.
        inputs: That it was traced with.
        layers: Names of those that are to run in integers.
        points: How many outputs got a grid of their own.
        reason: Why the batch size is fixed, "" if it isn't.
    """

    program: torch.export.ExportedProgram
    inputs: Inputs
    layers: tuple[str, ...]
    points: int
    reason: str

    def compare(self, runs: Callable[..., Any], runtime: str) -> None:
        """Compares a runtime with the program on torch, which computes in float.

        Roundings at ties differ, and move what is behind them by a step.

        Raises:
            VerificationError: The mean difference is more than 1 % of the largest answer.
        """
        with torch.no_grad():
            expected = self.inputs.call(self.program.module())
        for ours, theirs in zip(expected, self.inputs.call(runs), strict=True):
            error = float((ours.double() - theirs.double()).abs().mean())
            largest = float(ours.double().abs().max())
            if not error <= _TOLERANCE * largest + 1e-6:
                raise VerificationError(
                    f"{runtime} computes something else than the integer program: answers differ "
                    f"by {error:.1e} in the mean (the largest is {largest:.1e})"
                )


def integer_program(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    feed: Callable[[nn.Module], object],
    *,
    int32_bias: bool,
) -> IntegerProgram:
    """Exports a prepared model with the scales and zero points that it has.

    What it computes differs from the fake-quantized model by what is rounded at points of its own
    (outputs that an addition or a mean reads), and by half a step of each bias.

    Args:
        model: Prepared, with its ranges, in eval mode, on the CPU; it isn't changed.
        example_inputs: Positional arguments.
        feed: Runs a model that is called alike on calibration data, for grids of outputs.
        int32_bias: Biases in int32, with the scale S_weight S_input; else in float.

    Raises:
        ConfigError: A quantizer isn't affine or hasn't 8 bits; no layer is to run in integers.
        TaskError: A quantizer has no range yet, or `feed` ran nothing.
        StructureError: The model can't run on the example inputs.
        ArtifactError: torch.export can't export it.
    """
    layers, asked = integer_layers(model, example_inputs, int32_bias=int32_bias)
    program, inputs, _ = exported(layers, Inputs.of(example_inputs))
    with warnings.catch_warnings():  # torch copies what it calls deprecated itself
        warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
        # Without in-place operators.
        traced = program.run_decompositions({}).module(check_guards=False)
    module = fx.GraphModule(traced, traced.graph)
    linear = [
        node
        for node in module.graph.nodes
        if _kind(node) is _ATEN.linear
        and _is_integer(node)
        and (_end(node) is node or not int32_bias)
    ]
    watched = _watch(module, clamped=int32_bias)
    if watched:
        with torch.no_grad():
            feed(module)
    points = 0
    for node, range_ in watched.items():
        points += _round(module, node, range_)
    for node in linear:
        _round(module, _end(node), None)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    program, inputs, reason = exported(module, inputs)
    return IntegerProgram(program, inputs, asked, points, reason)


class _Range(nn.Module):
    """Keeps the smallest and the largest number that went through."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        self.low = torch.minimum(self.low, x.min())
        self.high = torch.maximum(self.high, x.max())
        return x


def _watch(module: fx.GraphModule, *, clamped: bool) -> dict[fx.Node, _Range]:
    """Puts a range behind each integer convolution, and behind a clamp that alone reads it.

    Where `clamped`, also behind a clamp of an integer linear layer: onnxruntime makes one float
    kernel of the two.
    """
    found: dict[fx.Node, _Range] = {}
    for node in list(module.graph.nodes):
        linear = clamped and _kind(node) is _ATEN.linear and _end(node) is not node
        if (_kind(node) in _CONVOLUTIONS or linear) and _is_integer(node):
            name = f"range_{len(found)}"
            range_ = _Range()
            module.add_module(name, range_)
            end = _end(node)
            users = list(end.users)
            with module.graph.inserting_after(end):
                new = module.graph.call_module(name, (end,))
            for user in users:
                user.replace_input_with(end, new)
            found[new] = range_
    module.recompile()
    return found


def _round(module: fx.GraphModule, node: fx.Node, range_: _Range | None) -> bool:
    """Rounds a node's values; whether that is to a grid of their own.

    Without a range, only where the grid of what reads them is one for all.
    """
    params, floats, moved = _readers(node)
    own = None
    if len(params) != 1 or floats:
        if range_ is None:
            return False
        own = _choose(params, range_)
    at = own or next(iter(params))
    value = node
    if range_ is not None:
        value = node.args[0]  # type: ignore[assignment]
        node.replace_all_uses_with(value)
        module.graph.erase_node(node)
        moved = [value, *moved]
    if _kind(value) in _CLAMPS:
        # Kernels round what they return: the clamp follows, unless the grid has no more than it.
        before: fx.Node = value.args[0]  # type: ignore[assignment]
        if _holds(value, at):
            value.replace_all_uses_with(before)
        value = before
    users = list(value.users)
    with module.graph.inserting_after(value):
        quantized = _insert(module.graph, _QUANTIZED.quantize_per_tensor.default, value, at)
    with module.graph.inserting_after(quantized):
        back = _insert(module.graph, _QUANTIZED.dequantize_per_tensor.default, quantized, at)
    for user in users:
        user.replace_input_with(value, back)
    for other in moved:
        if _kind(other) is _ATEN.relu and at[1] == 0:  # of what is 0 or more already
            other.replace_all_uses_with(other.args[0])  # type: ignore[arg-type]
    return own is not None and own not in params


def _insert(graph: fx.Graph, operator: Any, value: fx.Node, at: _Params) -> fx.Node:
    return graph.call_function(operator, (value, *at, 0, 255, torch.uint8))


def _readers(node: fx.Node) -> tuple[set[_Params], bool, list[fx.Node]]:
    """Grids that a node's values are rounded to before anything else is computed of them.

    Also whether anything reads them in float, and the nodes in between, that only move them.
    """
    params: set[_Params] = set()
    floats = False
    moved: list[fx.Node] = []
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if _kind(user) is _QUANTIZED.quantize_per_tensor:
            params.add((user.args[1], user.args[2]))  # type: ignore[arg-type]
        elif _kind(user) in _MOVES:
            if user not in moved:
                moved.append(user)
                todo.extend(user.users)
        else:
            floats = True
    return params, floats, moved


def _choose(params: set[_Params], range_: _Range) -> _Params:
    """The widest of the readers' grids if it holds the range, else the range's own.

    Raises:
        TaskError: Nothing was run, or what came out isn't finite.
    """
    if not bool(torch.isfinite(range_.low) & torch.isfinite(range_.high)):
        raise TaskError(
            "lowering needs the ranges of layers' outputs: the calibration data gave none, "
            "or numbers that aren't finite"
        )
    low, high = float(range_.low), float(range_.high)
    for scale, zero in sorted(params, reverse=True):
        if -scale * (zero + 1) <= low and high <= scale * (256 - zero):
            return scale, zero
    grid = make_grid(range_.low, range_.high, 8, symmetric=False)
    return float(grid.scale), int(grid.zero_point)


def _holds(clamp: fx.Node, at: _Params) -> bool:
    """Whether a clamp changes nothing of what is rounded to a grid: it is as wide or wider."""
    scale, zero = at
    low: Any = 0.0
    high: Any = None
    if _kind(clamp) is _ATEN.relu6:
        high = 6.0
    elif _kind(clamp) is not _ATEN.relu:
        default = (-1.0, 1.0) if _kind(clamp) is _ATEN.hardtanh else (None, None)
        given = [*clamp.args[1:], *default[len(clamp.args) - 1 :]]
        low = clamp.kwargs.get("min", given[0])
        high = clamp.kwargs.get("max", given[1])
    below = low is None or -scale * zero >= low - scale / 4
    return below and (high is None or scale * (255 - zero) <= high + scale / 4)


def _end(node: fx.Node) -> fx.Node:
    """A clamp that alone reads a node, or the node."""
    if len(node.users) == 1:
        (user,) = node.users
        if _kind(user) in _CLAMPS:
            return user
    return node


def _is_integer(node: fx.Node) -> bool:
    """Whether a layer's weight and input are dequantized integers."""
    return (
        _kind(node.args[0]) is _QUANTIZED.dequantize_per_tensor
        and _kind(node.args[1]) is _QUANTIZED.dequantize_per_channel
    )


def _kind(node: Any) -> Any:
    """The operator without its overload; None of what isn't one."""
    target = node.target if isinstance(node, fx.Node) else None
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else None
