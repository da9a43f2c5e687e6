"""Affine quantization and its simulation (Jacob et al. 2018, arXiv 1712.05877).

r = S (q - Z) with integers q (equation 1). `Grid` holds S, Z and the integers' range, for a whole
tensor or for each channel; `FakeQuantize` is a module that learns its grid from what it is given.

Shapes: S and Z are scalars, or (C,) for C channels along one dim of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.errors import ConfigError, TaskError
from raycompress.quantization.layers import quantized_layers

__all__ = [
    "FakeQuantize",
    "Grid",
    "check_bits",
    "integer_range",
    "make_grid",
    "observe_ranges",
    "quantizers_of",
]


def check_bits(name: str, bits: int) -> None:
    """Raises a ConfigError for bits that affine quantization doesn't have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(
            f"{name} must be an integer between 2 and 8, got {bits!r}; BNN and DoReFa have one bit"
        )


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest integer.

    Symmetric: -(2^(n-1) - 1) and 2^(n-1) - 1; the lowest of int8 is left out, so that no product
    of two integers reaches 2^14 (the paper's appendix B). Else 0 and 2^n - 1.
    """
    half = 2 ** (bits - 1)
    return (1 - half, half - 1) if symmetric else (0, 2 * half - 1)


@dataclass(frozen=True)
class Grid:
    """Numbers that integers stand for.

    Attributes:
        scale: S, above 0; a scalar or of shape (C,).
        zero_point: Z, an integer within the range, of scale's shape.
        low: The lowest integer.
        high: The highest integer.
        dim: Of the channels in tensors that are quantized; None: one grid for all.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    dim: int | None = None

    def _shaped(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale.to(dtype), self.zero_point.to(dtype)
        if self.dim is None:
            return scale, zero
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return scale.view(shape), zero.view(shape)

    def integers(self, x: Tensor) -> Tensor:
        """Q = clamp(round(x / S) + Z), int32 of x's shape."""
        scale, zero = self._shaped(x, _exact(x.dtype))
        rounded = torch.round(x.to(scale.dtype) / scale) + zero
        return rounded.clamp(self.low, self.high).to(torch.int32)

    def real(self, q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """S (q - Z), of q's shape."""
        scale, zero = self._shaped(q, dtype)
        return (q.to(dtype) - zero) * scale

    def fake(self, x: Tensor) -> Tensor:
        """S (q - Z) for q nearest to x; its gradient is 1 within the grid's ends and 0 outside."""
        scale, zero = self._shaped(x, _exact(x.dtype))
        quantized: Tensor = _Fake.apply(x, scale, zero, self.low, self.high)  # type: ignore[no-untyped-call]
        return quantized


def _exact(dtype: torch.dtype) -> torch.dtype:
    """In float32 also under autocast: bfloat16 can't tell 255 levels apart."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Fake(torch.autograd.Function):
    """Equation 12, and the straight-through estimator of section 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        v = x.to(scale.dtype)
        # By the integers, so that the mask and the clamp agree to the last bit.
        ctx.save_for_backward((v >= (low - zero) * scale) & (v <= (high - zero) * scale))
        integers = (torch.round(v / scale) + zero).clamp(low, high)
        return ((integers - zero) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None


def make_grid(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, dim: int | None = None
) -> Grid:
    """The grid of an observed range [low, high].

    The range is widened to hold 0, which then is an integer exactly (section 2.1). Affine:
    S = (b - a) / (2^n - 1), Z = clamp(round(q_min - a / S)) (equation 13; a and b move by up to
    S / 2 with it). Symmetric: S = max(-a, b) / (2^(n-1) - 1), Z = 0. A range of nothing but 0 has
    S = 1.

    Args:
        low: Smallest numbers seen; a scalar or (C,).
        high: Largest, of the same shape.
        bits: 2 to 8.
        symmetric: For weights.
        dim: Of the channels; None for scalars.
    """
    bottom, top = integer_range(bits, symmetric)
    a, b = low.detach().clamp(max=0), high.detach().clamp(min=0)
    scale = torch.maximum(-a, b) / top if symmetric else (b - a) / (top - bottom)
    # So small a range could have a scale of 0, or one whose reciprocal is infinite.
    scale = torch.where(scale >= 1e-30, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale)
    if not symmetric:
        zero = torch.round(bottom - a / scale).clamp(bottom, top)
    return Grid(scale, zero.to(torch.int32), bottom, top, dim)


class FakeQuantize(nn.Module):
    """Rounds what it is given to a grid, and learns the grid's range in training.

    The first batch sets the range, later ones move it by an exponential mean of minima and maxima
    (section 3.1); in eval mode no buffer changes. Buffers: `scale` and `zero_point`, which alone
    decide what comes out; `low` and `high`, the range seen, inf and -inf before; `steps`, the
    batches seen in training.

    Args:
        name: Of the layer and its part, for errors.
        bits: 2 to 8.
        symmetric: Integers from -(2^(n-1) - 1), with zero point 0; else from 0.
        channels: One grid for each of so many channels along dim 0; None: one for all.
        decay: Of the exponential mean, in [0, 1); 0: the range is that of the last batch.
        start_step: Batches seen in training before anything is rounded.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    steps: Tensor

    def __init__(
        self,
        name: str,
        bits: int,
        *,
        symmetric: bool,
        channels: int | None = None,
        decay: float = 0.0,
        start_step: int = 0,
    ) -> None:
        super().__init__()
        check_bits(f"bits of {name}", bits)
        self.name, self.bits, self.symmetric = name, bits, symmetric
        self.decay, self.start_step = decay, start_step
        self.dim = None if channels is None else 0
        self.integers = integer_range(bits, symmetric)
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("low", torch.full(shape, torch.inf))
        self.register_buffer("high", torch.full(shape, -torch.inf))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Copies as plain numbers: a forward pass that reads buffers can't be exported.
        self.ready, self.seen = False, 0

    @property
    def grid(self) -> Grid:
        """What it rounds to."""
        return Grid(self.scale, self.zero_point, *self.integers, self.dim)

    @property
    def active(self) -> bool:
        """Whether it rounds, rather than lets everything through."""
        return self.seen >= self.start_step

    def forward(self, x: Tensor) -> Tensor:
        """Activations or weights of any shape, of the same shape.

        Raises:
            TaskError: It has seen no data.
        """
        active = self.active
        if self.training:
            self.observe(x)
            self.seen += 1
            self.steps.fill_(self.seen)
        if not active:
            return x
        if not self.ready:
            raise TaskError(
                f"{self.name} has no range: it saw neither calibration data nor a training step"
            )
        return self.grid.fake(x)

    def observe(self, x: Tensor) -> None:
        """Takes the range of a tensor into account."""
        self.follow(*self.range_of(x))

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of a tensor, or of each channel."""
        v = x.detach().float()
        v = v.flatten() if self.dim is None else v.flatten(1)
        return v.amin(dim=-1), v.amax(dim=-1)

    def settle(self, weight: Tensor) -> None:
        """Takes a layer's weight as it is when training ends; so no step leaves it behind."""
        self.observe(weight)

    def follow(self, low: Tensor, high: Tensor) -> None:
        """Takes a range into account: `decay` of the one before, the rest from this one."""
        if self.ready and self.decay:
            low = self.decay * self.low + (1 - self.decay) * low
            high = self.decay * self.high + (1 - self.decay) * high
        self.set_range(low, high)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Makes a range its own, and the grid that of the range.

        Raises:
            TaskError: It isn't finite.
        """
        grid = make_grid(low, high, self.bits, self.symmetric, self.dim)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise TaskError(f"{self.name} was given numbers that aren't finite")
        self.low.copy_(low)
        self.high.copy_(high)
        self.scale.copy_(grid.scale)
        self.zero_point.copy_(grid.zero_point)
        self.ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = bool((self.low <= self.high).all())
        self.seen = int(self.steps)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        kind = "symmetric" if self.symmetric else "affine"
        each = "" if self.dim is None else f", {len(self.scale)} channels"
        return f"bits={self.bits}, {kind}{each}"


def quantizers_of(model: nn.Module) -> list[FakeQuantize]:
    """All of a model's, in its order of definition."""
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


def observe_ranges(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any]
) -> None:
    """Sets the ranges to the minima and maxima over batches, of the model in float.

    Those of weights stay: they are known without data.

    Args:
        model: Its modes stay as they are.
        forward: `forward(model, batch)`.
        batches: If there are none, ranges stay as they are.
    """

    def widen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FakeQuantize)
        low, high = module.range_of(args[0])
        if module in seen:
            low, high = torch.minimum(low, module.low), torch.maximum(high, module.high)
        seen.add(module)
        module.set_range(low, high)

    def in_float(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return args[0]

    seen: set[nn.Module] = set()
    weights = {layer.weight_quantizer for layer in quantized_layers(model).values()}
    handles = []
    quantizers = quantizers_of(model)
    modes = [quantizer.training for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.eval()
            if quantizer.dim is None:
                if quantizer not in weights:
                    handles.append(quantizer.register_forward_pre_hook(widen))
                handles.append(quantizer.register_forward_hook(in_float))
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for quantizer, mode in zip(quantizers, modes, strict=True):
            quantizer.train(mode)
