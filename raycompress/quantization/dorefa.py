"""DoReFa (Zhou et al. 2016, arXiv 1606.06160): few bits for weights, activations and gradients.

Shapes: weights of any shape, one layer at a time; activations and gradients have the batch first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycompress.errors import ConfigError
from raycompress.quantization.layers import attach
from raycompress.quantization.quantizer import Bits, Quantizer, inner_layers

__all__ = [
    "ActivationRounding",
    "DoReFa",
    "GradientRounding",
    "WeightRounding",
    "binarize_by_mean",
    "quantize_activation",
    "quantize_gradient",
    "quantize_unit",
    "quantize_weight",
]


class _Round(torch.autograd.Function):
    """q_k (equation 5): the nearest of 2^k levels in [0, 1]; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        return torch.round(x * steps) / steps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _MeanSign(torch.autograd.Function):
    """E|w| * sign(w); the gradient goes straight through, past the mean too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        mean = weight.abs().mean()
        return torch.where(weight >= 0, mean, -mean)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Gradient(torch.autograd.Function):
    """Nothing forward; the gradient is quantized."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        noise = torch.rand_like(gradient, dtype=torch.float32) - 0.5
        return quantize_gradient(gradient, ctx.bits, noise), None


def quantize_unit(x: Tensor, bits: int) -> Tensor:
    """q_k of equation 5: x in [0, 1], rounded to multiples of 1 / (2^k - 1)."""
    rounded: Tensor = _Round.apply(x, 2**bits - 1)  # type: ignore[no-untyped-call]
    return rounded


def binarize_by_mean(weight: Tensor) -> Tensor:
    """The case of one bit, E|w| * sign(w) with the mean over the whole layer, and sign(0) = 1.

    The mean is no function of the weights to the gradient (equation 7 passes it straight through).
    """
    signs: Tensor = _MeanSign.apply(weight)  # type: ignore[no-untyped-call]
    return signs


def quantize_weight(weight: Tensor, bits: int) -> Tensor:
    """A layer's weights (equations 7 and 9): 2 q_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1.

    The largest weight becomes 1 or -1, so a layer's scale is lost: a norm after it restores it.
    The maximum is a constant to the gradient, which is then (1 - tanh(w)^2) / max|tanh(w)|; the
    paper leaves it open.

    Args:
        weight: Of one layer, any shape.
        bits: 1: `binarize_by_mean`. 32: the weights as they are.
    """
    if bits >= 32:
        return weight
    if bits == 1:
        return binarize_by_mean(weight)
    bent = torch.tanh(weight.float())
    largest = bent.detach().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return (2 * quantize_unit(bent / (2 * largest) + 0.5, bits) - 1).to(weight.dtype)


def quantize_activation(x: Tensor, bits: int) -> Tensor:
    """q_k(clip(x, 0, 1)) (equation 11), whose gradient is 1 inside [0, 1] and 0 outside.

    Args:
        x: Any shape.
        bits: 32: x as it is, not clipped either.
    """
    if bits >= 32:
        return x
    # In float32 also under autocast: bfloat16 can't tell 255 levels apart.
    return quantize_unit(x.float().clamp(0, 1), bits).to(x.dtype)


def quantize_gradient(gradient: Tensor, bits: int, noise: Tensor) -> Tensor:
    """A gradient (equation 12): 2 m [q_k(g / (2 m) + 1/2 + noise / (2^k - 1)) - 1/2].

    m is the largest |g| of each example. With noise uniform in [-1/2, 1/2) the result is unbiased:
    its mean is g.

    Args:
        gradient: Shape (n, ...), the batch first.
        bits: Of each element.
        noise: One number for each element, of the gradient's shape.
    """
    steps = 2**bits - 1
    g = gradient.float()
    largest = g.abs().amax(dim=tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g.abs()
    span = 2 * largest.clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.round(((g / span + 0.5) * steps + noise).clamp(0, steps)) / steps
    quantized: Tensor = (levels - 0.5) * span * (largest > 0)
    return quantized.to(gradient.dtype)


class WeightRounding(nn.Module):
    """`quantize_weight` as a module.

    Args:
        bits: 1 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        """Weights of one layer, of the same shape."""
        return quantize_weight(weight, self.bits)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"bits={self.bits}"


class ActivationRounding(WeightRounding):
    """`quantize_activation` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Activations of any shape, of the same shape."""
        return quantize_activation(x, self.bits)


class GradientRounding(WeightRounding):
    """Lets a layer's output through, and quantizes its gradient, in training alone.

    The noise comes from torch's generator, as dropout's does: a training loop seeds both.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns x itself."""
        if not self.training:
            return x
        same: Tensor = _Gradient.apply(x, self.bits)  # type: ignore[no-untyped-call]
        return same


@dataclass(frozen=True, kw_only=True)
class DoReFa(Quantizer):
    """Few bits for weights, what layers are given, and the gradients of what they return.

    A norm belongs behind each quantized layer, since weights lose their scale. The first and the
    last layer stay in float unless they are asked for (section 2.6).

    Attributes:
        weight_bits: 1 to 8; 32: float.
        activation_bits: 1 to 8; 32: float.
        gradient_bits: 1 to 8; 32: float. In training alone.
    """

    weight_bits: int = 1
    activation_bits: int = 2
    gradient_bits: int = 32

    needs_data: ClassVar[bool] = False
    trains: ClassVar = "yes"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "gradient_bits"):
            _check(name, getattr(self, name))

    def choose(self, model: nn.Module) -> dict[str, Bits]:
        """All layers but the first and the last."""
        bits = Bits(weight=self.weight_bits, input=self.activation_bits)
        return dict.fromkeys(inner_layers(model), bits)

    def prepare(self, model: nn.Module, choices: Mapping[str, Bits]) -> None:
        """Rounds the weights and inputs of the chosen layers."""
        for name, bits in choices.items():
            if bits.output is not None:
                raise ConfigError(f"DoReFa quantizes no outputs, got {bits.output} bits: {name}")
            for part in ("weight", "input"):
                if getattr(bits, part) is not None:
                    _check(f"{part} bits of {name}", getattr(bits, part))
        for name, bits in choices.items():
            attach(
                model.get_submodule(name),
                weight=None if bits.weight in (None, 32) else WeightRounding(bits.weight),
                input=None if bits.input in (None, 32) else ActivationRounding(bits.input),
                output=None if self.gradient_bits == 32 else GradientRounding(self.gradient_bits),
            )


def _check(name: str, bits: int) -> None:
    if not (1 <= bits <= 8 or bits == 32):
        raise ConfigError(f"{name} must be between 1 and 8, or 32 for float, got {bits}")
