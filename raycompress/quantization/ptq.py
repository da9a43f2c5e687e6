"""Post-training quantization: grids from calibration data, without training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raycompress.errors import ConfigError, EvaluationError
from raycompress.quantization.bias_correction import add_biases, correct_biases
from raycompress.quantization.equalize import equalize
from raycompress.quantization.fake_quant import FakeQuantize, check_bits
from raycompress.quantization.layers import in_float, quantized_layers
from raycompress.quantization.observers import OBSERVERS, Observer, Percentile
from raycompress.quantization.qat import attach_grids
from raycompress.quantization.quantizer import Bits, Quantizer, check_parts, default_layers
from raycompress.wording import near

__all__ = ["PTQ"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PTQ(Quantizer):
    """Weights by their minima and maxima, inputs by what an observer saw of the float model.

    Weights have symmetric grids, inputs affine ones that hold 0. Every value of the calibration
    batches counts, in histograms of a fixed size.

    Attributes:
        weight_bits: 2 to 8.
        input_bits: 2 to 8.
        per_channel: A scale for each output channel of weights, in place of one for the layer.
        fold_norms: Round weights as they are with the BatchNorm behind them folded in.
        observer: What sets the ranges of inputs and outputs: "minmax" keeps every value in them,
            "percentile" leaves out a share at either end, "mse" minimises the squared error,
            "entropy" the Kullback-Leibler divergence.
        percentile: Percent of the values at either end that "percentile" keeps, in (50, 100].
        bias_correction: Take the mean that rounding adds to a layer's outputs from its bias
            (1906.04721, section 4.2); a layer without a bias gets one.
        equalize: Scale channels between two layers so that their weights' ranges are alike
            (1906.04721, section 4.1), which helps where `per_channel` is false.
    """

    weight_bits: int = 8
    input_bits: int = 8
    per_channel: bool = True
    fold_norms: bool = True
    observer: str = "mse"
    percentile: float = Percentile.percentile
    bias_correction: bool = False
    equalize: bool = False

    parts: ClassVar[tuple[str, ...]] = ("weight", "input", "output")
    trains: ClassVar[Literal["no", "optional", "yes"]] = "no"

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("input_bits", self.input_bits)
        if self.observer not in OBSERVERS:
            raise ConfigError(
                f"observer must be one of {', '.join(OBSERVERS)}, got {self.observer!r}"
                f"{near(self.observer, OBSERVERS)}"
            )
        Percentile(percentile=self.percentile)  # refuses what isn't one
        if self.observer != "percentile" and self.percentile != Percentile.percentile:
            raise ConfigError(
                f"percentile is for the observer 'percentile', got {self.percentile:g} with "
                f"{self.observer!r}"
            )

    def choose(self, model: nn.Module) -> dict[str, Bits]:
        """All layers."""
        bits = Bits(weight=self.weight_bits, input=self.input_bits)
        return dict.fromkeys(default_layers(model), bits)

    def prepare(self, model: nn.Module, choices: Mapping[str, Bits]) -> None:
        """Gives the chosen layers grids; those of inputs and outputs wait for `calibrate`."""
        check_parts(self, choices)
        attach_grids(model, choices, self.per_channel, self.fold_norms)
        if self.bias_correction:
            add_biases(model)

    def calibrate(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any]
    ) -> None:
        """Sets ranges and biases; a second time with the same batches to the same ones.

        Raises:
            ConfigError: There are no batches.
            EvaluationError: An activation isn't finite.
        """
        batches = list(batches)
        if not batches:
            raise ConfigError("PTQ needs calibration data, and there is no batch of it")
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                if self.equalize:
                    equalize(model, forward, batches[0])
                self._set_ranges(model, forward, batches)
                if self.bias_correction:
                    correct_biases(model, forward, batches)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _observer(self) -> Observer:
        if self.observer == "percentile":
            return Percentile(percentile=self.percentile)
        return OBSERVERS[self.observer]()

    def _set_ranges(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Sequence[Any]
    ) -> None:
        """One pass of the float model over all batches."""
        observers: dict[FakeQuantize, Observer] = {}

        def observe(quantizer: FakeQuantize, values: Tensor) -> None:
            try:
                observers[quantizer].observe(values)
            except EvaluationError as error:
                raise EvaluationError(f"{quantizer.name}: {error}") from None

        handles = []
        for layer in quantized_layers(model).values():
            source, result = layer.input_quantizer, layer.output_quantizer
            if isinstance(source, FakeQuantize):
                observers[source] = self._observer()
                handles.append(
                    layer.register_forward_pre_hook(lambda _, args, q=source: observe(q, args[0]))
                )
            if isinstance(result, FakeQuantize):
                observers[result] = self._observer()
                handles.append(
                    layer.register_forward_hook(lambda _, args, out, q=result: observe(q, out))
                )
        try:
            with in_float(model):
                for batch in batches:
                    forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        for quantizer, observer in observers.items():
            if not observer.count:
                _log.warning("%s has no range: calibration never called it", quantizer.name)
                continue
            low, high = observer.range(quantizer.bits)
            quantizer.set_range(torch.tensor(low), torch.tensor(high))
