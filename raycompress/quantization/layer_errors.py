"""What rounding does to each layer of a quantized model, measured on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.layer_rows import targets_of
from raycompress.quantization.dorefa import GradientRounding
from raycompress.quantization.layers import QUANTIZED, QuantizedLayer, in_float, quantized_layers

__all__ = ["LayerError", "layer_errors"]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One quantized layer; a row of a table by `vars`.

    SQNR, the signal to quantization noise ratio, is 10 log10(sum x^2 / sum (x_q - x)^2) in dB for
    numbers x and what became of them: 6 dB more are one bit more. Infinite where nothing changed;
    None where the part isn't quantized or nothing but 0 was seen.

    Attributes:
        layer: Its name.
        type: Its class in the float model.
        weight_bits: None: in float, or the quantizer has no `bits`; so are the other parts'.
        input_bits: Of what it is given.
        output_bits: Of what it returns.
        weight_low: The smallest number that is rounded, the weight's with its norm folded in.
        weight_high: The largest.
        input_low: The smallest input seen, of the float model.
        input_high: The largest.
        output_low: The smallest output seen, of the float model, before any norm.
        output_high: The largest.
        weight_sqnr: Of the weight, in dB.
        input_sqnr: Of the float model's inputs to this layer.
        output_sqnr: Of the layer's outputs if it alone is quantized.
        chain_sqnr: Of the layer's outputs in the quantized model, with all errors before it.
    """

    layer: str
    type: str
    weight_bits: int | None
    input_bits: int | None
    output_bits: int | None
    weight_low: float
    weight_high: float
    input_low: float | None
    input_high: float | None
    output_low: float | None
    output_high: float | None
    weight_sqnr: float | None
    input_sqnr: float | None
    output_sqnr: float | None
    chain_sqnr: float | None


@dataclass
class _Sums:
    """Of one tensor, over batches."""

    low: float = math.inf
    high: float = -math.inf
    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, quantized: Tensor) -> None:
        if exact.numel():
            x = exact.double()
            self.low = min(self.low, float(x.min()))
            self.high = max(self.high, float(x.max()))
            self.signal += float(x.square().sum())
            self.noise += float((quantized.double() - x).square().sum())

    def sqnr(self) -> float | None:
        if not self.signal:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


@dataclass
class _Seen:
    source: _Sums = field(default_factory=_Sums)
    alone: _Sums = field(default_factory=_Sums)
    chain: _Sums = field(default_factory=_Sums)
    # Of the batch under way: some rows of what the float model returned.
    rows: list[Tensor] = field(default_factory=list)


def layer_errors(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any]
) -> tuple[LayerError, ...]:
    """Compares a quantized model with itself in float, layer by layer.

    In float means the weights as they are before they are rounded: what training changed is no
    error, and what equalisation scaled is scaled in both. A layer's outputs in the quantized model
    are compared at no more than `MAX_ROWS` of a batch's positions, which bounds the memory.

    Args:
        model: Quantized and calibrated, in eval mode; it isn't changed.
        forward: `forward(model, batch)`.
        batches: Each is run twice.

    Returns:
        Rows in the model's order of definition.
    """
    layers = quantized_layers(model)
    seen = {name: _Seen() for name in layers}
    with torch.no_grad():
        for batch in batches:
            with in_float(model), _Hooked(layers, seen, _see_float):
                forward(model, batch)
            with _Hooked(layers, seen, _see_quantized):
                forward(model, batch)
            for each in seen.values():
                each.rows.clear()
        return tuple(_row(name, layer, seen[name]) for name, layer in layers.items())


class _Hooked:
    """Calls `see(what was seen, layer, input, output)` after each call of a layer."""

    def __init__(
        self,
        layers: dict[str, QuantizedLayer],
        seen: dict[str, _Seen],
        see: Callable[[_Seen, Any, Tensor, Tensor], None],
    ) -> None:
        self.layers, self.seen, self.see = layers, seen, see
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, layer in self.layers.items():

            def hook(module: Any, args: Any, out: Tensor, own: _Seen = self.seen[name]) -> None:
                self.see(own, module, args[0], out)

            self.handles.append(layer.register_forward_hook(hook))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _see_float(seen: _Seen, layer: Any, x: Tensor, out: Tensor) -> None:
    """The layer is of its float class meanwhile; what it would do as quantized is worked out."""
    quantized = x if layer.input_quantizer is None else layer.input_quantizer(x)
    seen.source.add(x, quantized)
    kind = QUANTIZED[type(layer)]
    alone = kind._compute(layer, quantized, QuantizedLayer.quantized_weight(layer))
    if layer.output_quantizer is not None:
        alone = layer.output_quantizer(alone)
    seen.alone.add(out, alone)
    seen.rows.append(targets_of(layer, out).clone())


def _see_quantized(seen: _Seen, layer: Any, x: Tensor, out: Tensor) -> None:
    seen.chain.add(seen.rows.pop(0), targets_of(layer, out))


def _row(name: str, layer: QuantizedLayer, seen: _Seen) -> LayerError:
    weight = layer.weight.detach()
    quantized = layer.quantized_weight()
    quantizer = layer.weight_quantizer
    if quantizer is not None and hasattr(quantizer, "factor"):
        factor: Tensor = quantizer.factor(weight)  # type: ignore[operator]
        weight, quantized = weight * factor, quantized * factor
    sums = _Sums()
    sums.add(weight, quantized)
    called = seen.source.low <= seen.source.high

    def bits(part: nn.Module | None) -> int | None:
        # One of a user's own needn't say; one of gradients rounds nothing here.
        known = None if isinstance(part, GradientRounding) else getattr(part, "bits", None)
        return known if isinstance(known, int) else None

    return LayerError(
        layer=name,
        type=next(kind.__name__ for kind, own in QUANTIZED.items() if own is type(layer)),
        weight_bits=bits(quantizer),
        input_bits=bits(layer.input_quantizer),
        output_bits=bits(layer.output_quantizer),
        weight_low=sums.low,
        weight_high=sums.high,
        input_low=seen.source.low if called else None,
        input_high=seen.source.high if called else None,
        output_low=seen.alone.low if called else None,
        output_high=seen.alone.high if called else None,
        weight_sqnr=None if quantizer is None else sums.sqnr(),
        input_sqnr=None if layer.input_quantizer is None else seen.source.sqnr(),
        output_sqnr=seen.alone.sqnr(),
        chain_sqnr=seen.chain.sqnr(),
    )
