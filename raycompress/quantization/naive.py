"""Weights of eight bits by their range, without training: NNI's NaiveQuantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from raycompress.quantization.fake_quant import FakeQuantize, check_bits
from raycompress.quantization.layers import attach
from raycompress.quantization.quantizer import Bits, Quantizer, check_parts, default_layers

__all__ = ["NaiveQuantizer", "weight_quantizer"]


@dataclass(frozen=True, kw_only=True)
class NaiveQuantizer(Quantizer):
    """Weights rounded to multiples of max|w| / 127; inputs stay in float.

    NNI overwrites the weights by what they are rounded to; here they stay what is trained.

    Attributes:
        weight_bits: 2 to 8.
        per_channel: A scale for each output channel, in place of one for the layer.
    """

    weight_bits: int = 8
    per_channel: bool = False

    parts: ClassVar[tuple[str, ...]] = ("weight",)
    needs_data: ClassVar[bool] = False
    trains: ClassVar = "no"

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)

    def choose(self, model: nn.Module) -> dict[str, Bits]:
        """All layers."""
        return dict.fromkeys(default_layers(model), Bits(weight=self.weight_bits))

    def prepare(self, model: nn.Module, choices: Mapping[str, Bits]) -> None:
        """Gives the chosen layers grids of their weights."""
        check_parts(self, choices)
        for name, bits in choices.items():
            layer = model.get_submodule(name)
            if bits.weight is not None:
                weight = layer.get_parameter("weight")
                attach(layer, weight=weight_quantizer(name, weight, bits.weight, self.per_channel))


def weight_quantizer(name: str, weight: Tensor, bits: int, per_channel: bool) -> FakeQuantize:
    """Symmetric, with the range of the weight.

    Args:
        name: Of the layer.
        weight: Output channels first.
        bits: 2 to 8.
        per_channel: A scale for each output channel.
    """
    made = FakeQuantize(
        f"the weight of {name!r}",
        bits,
        symmetric=True,
        channels=len(weight) if per_channel else None,
    )
    made.observe(weight)
    return made
