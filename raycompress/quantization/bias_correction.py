"""Bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2 and appendix D).

Rounding shifts the mean of what a layer returns. The shift of each channel, measured on calibration
data, is taken from its bias, layer by layer in the order of the forward pass, so that each layer is
measured behind layers that are corrected already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.quantization.layers import QuantizedLayer, in_float, quantized_layers

__all__ = ["add_biases", "correct_biases"]


def add_biases(model: nn.Module) -> None:
    """Gives quantized layers a bias, and a buffer `float_bias` for that of the float model.

    Args:
        model: Prepared; in place. A layer without a bias gets one of zeros.
    """
    for layer in quantized_layers(model).values():
        if layer.bias is None:
            zeros = torch.zeros(len(layer.weight), dtype=layer.weight.dtype)
            layer.bias = nn.Parameter(
                zeros.to(layer.weight.device), requires_grad=layer.weight.requires_grad
            )
        assert isinstance(layer.bias, Tensor)
        layer.register_buffer("float_bias", layer.bias.detach().clone())


def correct_biases(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Sequence[Any]
) -> None:
    """Sets the biases so that each layer's mean output is the float model's, in each channel.

    One pass over the batches in float, and a part of one for each layer. A layer that is called
    several times in a pass has one correction, for the mean of all its calls. Biases that were
    corrected before start from `float_bias` again.

    Args:
        model: After `add_biases`, with ranges, in eval mode.
        forward: `forward(model, batch)`.
        batches: Calibration data.
    """
    layers = quantized_layers(model)
    for layer in layers.values():
        assert isinstance(layer.bias, Tensor)
        layer.bias.data.copy_(layer.float_bias)
    wanted = {name: _Means() for name in layers}
    order: dict[str, None] = {}
    handles = []
    for name, layer in layers.items():

        def hook(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
            order[name] = None
            wanted[name].add(module, out)

        handles.append(layer.register_forward_hook(hook))
    try:
        with torch.no_grad(), in_float(model):
            for batch in batches:
                for means in wanted.values():
                    means.calls.append(0)
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name in order:
        layer, means = layers[name], wanted[name]
        got = _means_of(model, layer, forward, batches, means.calls)
        assert isinstance(layer.bias, Tensor)
        layer.bias.data += (means.mean() - got.mean()).to(layer.bias.dtype)


class _Means:
    """Of a layer's output channels; `calls` has the calls in each batch."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.calls: list[int] = []

    def add(self, layer: nn.Module, out: Tensor) -> None:
        # Channels are the last dim of a linear layer's output, and the one after the batch of a
        # convolution's; without a batch they are the first.
        rows = out.double()
        if not isinstance(layer, nn.Linear):
            spatial = len(layer.kernel_size)  # type: ignore[arg-type]
            rows = rows.movedim(-1 - spatial, -1)
        rows = rows.flatten(0, -2) if rows.dim() > 1 else rows[None]
        self.total = rows.sum(dim=0) + (0 if self.total is None else self.total)
        self.count += len(rows)
        self.calls[-1] += 1

    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count


class _Enough(Exception):
    """All calls of the layer were seen; the rest of the pass isn't needed."""


def _means_of(
    model: nn.Module,
    layer: QuantizedLayer,
    forward: Callable[[nn.Module, Any], Any],
    batches: Sequence[Any],
    calls: Sequence[int],
) -> _Means:
    """Means of one layer of the quantized model, before its outputs are rounded."""
    means = _Means()

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        means.add(module, out)
        if means.calls[-1] == num:
            raise _Enough

    quantizer = layer.output_quantizer
    layer.output_quantizer = None
    handle = layer.register_forward_hook(hook)
    try:
        with torch.no_grad():
            for batch, num in zip(batches, calls, strict=True):
                means.calls.append(0)
                if num:
                    try:
                        forward(model, batch)
                    except _Enough:
                        continue
    finally:
        handle.remove()
        layer.output_quantizer = quantizer
    return means
