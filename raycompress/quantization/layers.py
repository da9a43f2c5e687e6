"""Layers that quantize what they compute with: subclasses of torch's own, with the same keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["QUANTIZED", "QuantizedLayer", "attach", "in_float", "quantized_layers"]


class QuantizedLayer(nn.Module):
    """A layer with quantizers of its weight, its input and its output; each may be absent.

    The parameter `weight` stays what is trained; what a forward pass uses is made of it each time.
    """

    weight: Tensor
    weight_quantizer: nn.Module | None
    input_quantizer: nn.Module | None
    output_quantizer: nn.Module | None
    float_bias: Tensor

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        if self.weight_quantizer is None:
            return self.weight
        quantized: Tensor = self.weight_quantizer(self.weight)
        return quantized

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """As the float layer, on quantized numbers."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        x = self._compute(x, self.quantized_weight())
        if self.output_quantizer is not None:
            x = self.output_quantizer(x)
        return x


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` with quantizers."""

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, self.bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """`nn.Conv1d` with quantizers."""

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` with quantizers."""

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """`nn.Conv3d` with quantizers."""

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
}
"""What becomes what; a class of the user's that inherits from one has a forward of its own."""


def attach(
    layer: nn.Module,
    *,
    weight: nn.Module | None = None,
    input: nn.Module | None = None,
    output: nn.Module | None = None,
) -> None:
    """Turns a layer, in place, into its quantized subclass: it stays the same object.

    So hooks, ties and every reference to it stay.

    Raises:
        TypeError: There is no such subclass of its class.
    """
    if type(layer) not in QUANTIZED:
        raise TypeError(f"layers of type {type(layer).__name__} can't be quantized")
    layer.__class__ = QUANTIZED[type(layer)]
    device = next(layer.parameters()).device
    for name, module in (("weight", weight), ("input", input), ("output", output)):
        setattr(layer, f"{name}_quantizer", None)
        if module is not None:
            delattr(layer, f"{name}_quantizer")
            layer.add_module(f"{name}_quantizer", module.to(device).train(layer.training))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Quantized layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Meanwhile a prepared model computes as if its layers had no quantizers.

    A layer whose bias was corrected for what quantization does to it has the bias of before, its
    buffer `float_bias`. Everything is put back.
    """
    layers = list(quantized_layers(model).values())
    kinds = [type(layer) for layer in layers]
    biases = {layer: layer.bias for layer in layers if "float_bias" in layer._buffers}
    plain: dict[type, Any] = {quantized: kind for kind, quantized in QUANTIZED.items()}
    try:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = plain[kind]
            if layer in biases:
                layer.bias = nn.Parameter(layer.float_bias, requires_grad=False)
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
            if layer in biases:
                layer.bias = biases[layer]
