"""Quantized layers with the integers that kernels are given, in place of fake quantization.

Shapes: weights (C, ...), the output channels first; scales of weights (C,).
"""

from __future__ import annotations

from typing import Any

import torch

# Registers the operators below; torch.onnx and inductor know them by these names.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.nn import functional

from raycompress.errors import ConfigError, TaskError
from raycompress.quantization.fake_quant import FakeQuantize, Grid
from raycompress.quantization.layers import QuantizedLayer, quantized_layers
from raycompress.quantization.norms import norms_behind
from raycompress.quantization.qat import fold_norms

__all__ = ["IntegerLayer", "dequantized", "integer_layers"]

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1
_QUANTIZED = torch.ops.quantized_decomposed


def dequantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """X as uint8 and back in float: what a runtime makes integers of."""
    limits = (scale, zero_point, 0, 255, torch.uint8)
    return _QUANTIZED.dequantize_per_tensor(  # type: ignore[no-any-return]
        _QUANTIZED.quantize_per_tensor(x, *limits), *limits
    )


class IntegerLayer(nn.Module):
    """A linear or convolutional layer on int8 weights and uint8 inputs.

    Weights are stored in int8 with a scale for each output channel; a bias in int32 with the scale
    S_weight S_input, or in float. Inputs and outputs have one scale and zero point each. A part
    without a quantizer stays in float.

    Args:
        name: Of the layer.
        layer: With its quantizers.
        norm: A BatchNorm behind it, that its scales and its bias take in.
        int32_bias: Where weight and input are quantized.

    Raises:
        ConfigError: Its quantizers aren't affine ones of 8 bits.
        TaskError: They have no ranges yet.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    bias_scale: Tensor
    zeros: Tensor

    def __init__(
        self, name: str, layer: QuantizedLayer, norm: nn.Module | None, int32_bias: bool
    ) -> None:
        super().__init__()
        made_of: Any = layer
        self.linear = isinstance(layer, nn.Linear)
        if not self.linear:
            self._take_shape(made_of)
        self.input = _activation(layer.input_quantizer, f"the input of {name!r}")
        self.output = _activation(layer.output_quantizer, f"the output of {name!r}")
        grid = _grid(layer.weight_quantizer, f"the weight of {name!r}")
        bias: Tensor | None = made_of.bias
        bias = None if bias is None else bias.detach().float()
        factor, shift = torch.ones(len(layer.weight)), None
        if norm is not None:
            factor, shift = _norm(norm)
            bias = shift if bias is None else bias * factor + shift
        self.bits = None if grid is None else 8
        if grid is None:
            self.register_buffer("weight", layer.weight.detach() * _as(factor, layer.weight))
        else:
            self._take_weight(layer.weight.detach(), grid, factor, name)
        self.int32_bias = int32_bias and grid is not None and self.input is not None
        if self.int32_bias:
            self._take_bias(torch.zeros(len(self.weight)) if bias is None else bias)
        else:
            self.register_buffer("bias", bias)

    def _take_shape(self, layer: Any) -> None:
        """Padding that kernels don't have is done before the input is rounded, which is the same.

        For 0 is an integer exactly.
        """
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        around = list(layer._reversed_padding_repeated_twice)
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.around: list[int] = []
        self.padding = tuple(reversed(around[::2]))
        if self.mode != "constant" or around[::2] != around[1::2]:
            self.around, self.padding = around, (0,) * len(self.padding)

    def _take_weight(self, weight: Tensor, grid: Grid, factor: Tensor, name: str) -> None:
        if grid.low < -128 or grid.high > 127 or bool(grid.zero_point.any()):
            raise ConfigError(f"the weight of {name!r} has zero points: kernels have them at 0")
        codes = grid.integers(weight)
        # A norm's negative factor turns the integers' sign, since scales are above 0.
        codes = (codes * _as(factor.sign().int(), codes)).clamp(-128, 127)
        scale = grid.scale.detach().float().expand(len(weight)) * factor.abs()
        self.register_buffer("weight", codes.to(torch.int8))
        self.register_buffer("weight_scale", torch.where(factor == 0, 1.0, scale))
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.int64))

    def _take_bias(self, bias: Tensor) -> None:
        assert self.input is not None
        # A channel of next to nothing but bias: its weights get coarser until the bias fits.
        least = bias.abs() / (2**30 * self.input[0])
        coarser = torch.maximum(self.weight_scale, least)
        ratio = _as((self.weight_scale.double() / coarser.double()), self.weight)
        self.weight.copy_(torch.round(self.weight * ratio))
        self.weight_scale.copy_(coarser)
        scale = self.weight_scale * self.input[0]
        codes = torch.round(bias.double() / scale.double())
        self.register_buffer("bias_scale", scale)
        self.register_buffer("bias", codes.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, and the norm that it took in."""
        if not self.linear and self.around:
            x = functional.pad(x, self.around, self.mode)
        if self.input is not None:
            x = dequantized(x, *self.input)
        weight, bias = self.weight, self.bias
        if self.bits is not None:
            limits = (self.weight_scale, self.zeros, 0, -128, 127, torch.int8)
            weight = _QUANTIZED.dequantize_per_channel(weight, *limits)
        if self.int32_bias:
            ends = (self.bias_scale, self.zeros, 0, _LOWEST, _HIGHEST, torch.int32)
            bias = _QUANTIZED.dequantize_per_channel(bias, *ends)
        y = self._compute(x, weight, bias)
        return y if self.output is None else dequantized(y, *self.output)

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.linear:
            if x.dim() == 2:
                return functional.linear(x, weight, bias)
            # Kernels multiply matrices.
            flat = functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
            return flat.reshape(*x.shape[:-1], len(weight))
        convolve = getattr(functional, f"conv{weight.dim() - 2}d")
        y: Tensor = convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return y


def integer_layers(
    model: nn.Module, example_inputs: tuple[Any, ...], *, int32_bias: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy whose quantized layers hold integers, with the BatchNorms right behind them folded in.

    Args:
        model: Prepared, with its ranges, on the CPU; in eval mode.
        example_inputs: For one forward pass, to find norms.
        int32_bias: Biases in int32.

    Returns:
        The copy, and the names of the layers that are to run in integers: those with 8 bits for
        both their weight and their input.

    Raises:
        ConfigError: A quantizer isn't affine or hasn't 8 bits; no layer is to run in integers.
        TaskError: A quantizer has no range yet.
        StructureError: The model can't run on the example inputs.
    """
    model = fold_norms(model).eval()
    for name, layer in quantized_layers(model).items():  # before the model runs
        for part in ("weight", "input", "output"):
            _grid(getattr(layer, f"{part}_quantizer"), f"the {part} of {name!r}")
    norms = norms_behind(model, example_inputs)
    asked = []
    for name, layer in quantized_layers(model).items():
        norm = None
        if name in norms and layer.output_quantizer is None:
            norm = model.get_submodule(norms[name])
            _replace(model, norm, nn.Identity())
        made = IntegerLayer(name, layer, norm, int32_bias)
        _replace(model, layer, made)
        if made.bits is not None and made.input is not None:
            asked.append(name)
    if not asked:
        raise ConfigError(
            "no layer can run in integers: none has 8 bits for both its weight and its input "
            "(quant_types must name weight and input)"
        )
    return model, tuple(asked)


def _grid(quantizer: nn.Module | None, what: str) -> Grid | None:
    """What a quantizer rounds to; None without one."""
    if quantizer is None:
        return None
    bits = getattr(quantizer, "bits", None)
    if not hasattr(quantizer, "grid") or hasattr(quantizer, "factor"):
        raise ConfigError(
            f"{what} isn't quantized to a scale and a zero point ({type(quantizer).__name__}), as "
            "kernels have them; lower to packed instead, which stores it small"
        )
    if bits != 8:
        raise ConfigError(
            f"{what} has {bits} bits; kernels have 8. Lower to packed instead, which stores it "
            "small"
        )
    grid: Grid = quantizer.grid  # type: ignore[assignment]
    started = grid.high > grid.low
    if isinstance(quantizer, FakeQuantize):
        started = quantizer.ready and quantizer.active
    if not started:
        raise TaskError(f"{what} has no range yet: calibrate or train the model before lowering")
    return grid


def _activation(quantizer: nn.Module | None, what: str) -> tuple[float, int] | None:
    """Scale and zero point of a uint8; signed grids are moved up by 128, which changes nothing."""
    grid = _grid(quantizer, what)
    if grid is None:
        return None
    if grid.dim is not None or grid.high - grid.low != 255:
        raise ConfigError(
            f"{what}: kernels have one grid for a tensor, of 256 integers; got "
            f"{grid.high - grid.low + 1} for {'each channel' if grid.dim is not None else 'it'}"
        )
    return float(grid.scale), int(grid.zero_point) - grid.low


def _norm(norm: Any) -> tuple[Tensor, Tensor]:
    """What an evaluated BatchNorm multiplies by, and adds."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    shift = torch.zeros_like(factor)
    if norm.affine:
        factor, shift = factor * norm.weight.detach(), norm.bias.detach()
    return factor, shift - factor * norm.running_mean


def _as(values: Tensor, weight: Tensor) -> Tensor:
    """One value for each output channel, shaped for a weight."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Everywhere that it is."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
