"""LSQ (Esser et al. 2020, arXiv 1902.08153): the step size of a quantizer is learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LearnedStep", "first_step_size", "quantize_with_step"]


class _LSQ(torch.autograd.Function):
    """Equations 1 to 3 and 5 of the paper."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, low: int, high: int, scale: float) -> Tensor:
        ratio = v.float() / step
        ctx.save_for_backward(ratio)
        ctx.low, ctx.high, ctx.scale, ctx.step_shape = low, high, scale, step.shape
        return (torch.round(ratio.clamp(low, high)) * step).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (ratio,) = ctx.saved_tensors
        below, above = ratio <= ctx.low, ratio >= ctx.high
        inside = ~(below | above)
        slope = torch.where(inside, torch.round(ratio) - ratio, 0.0)
        slope = torch.where(below, float(ctx.low), torch.where(above, float(ctx.high), slope))
        to_step = (gradient.float() * slope).sum() * ctx.scale
        return gradient * inside, to_step.view(ctx.step_shape), None, None, None


def quantize_with_step(v: Tensor, step: Tensor, low: int, high: int, count: int) -> Tensor:
    """round(clip(v / s, low, high)) * s, with the paper's gradients to v and to s.

    To v (equation 5): 1 where low < v / s < high, else 0. To s (equation 3): low or high where v is
    clipped, round(v / s) - v / s elsewhere, times 1 / sqrt(count * high) (section 2.2).

    Args:
        v: Weights or activations.
        step: s, one element, above 0.
        low: -Q_N, the lowest integer: -2^(b-1), or 0 without sign.
        high: Q_P, the highest: 2^(b-1) - 1, or 2^b - 1 without sign.
        count: Weights of the layer, or features (elements of one example).
    """
    scale = 1 / math.sqrt(count * high)
    quantized: Tensor = _LSQ.apply(v, step, low, high, scale)  # type: ignore[no-untyped-call]
    return quantized


def first_step_size(v: Tensor, high: int) -> Tensor:
    """2 mean|v| / sqrt(Q_P) (section 2.1), and 1 where all v are 0; a scalar."""
    mean = v.detach().float().abs().mean()
    return torch.where(mean > 0, 2 * mean / math.sqrt(high), torch.ones_like(mean))


class LearnedStep(nn.Module):
    """Quantizes by a step size that is a parameter; the first batch in training sets it.

    Until then nothing is quantized. That batch also tells whether the integers have a sign.

    Args:
        bits: 2 to 8. One bit with a sign has no positive integer.
        weight: Start with these weights, and count them; None: for activations.
    """

    limits: Tensor

    def __init__(self, bits: int, weight: Tensor | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.count = None if weight is None else weight.numel()
        device = None if weight is None else weight.device
        self.step = nn.Parameter(torch.ones((), device=device))
        # The integers' range, 0 and 0 before it is known: as a buffer for state dicts, and as
        # numbers for what is traced.
        self.register_buffer("limits", torch.zeros(2, dtype=torch.int32, device=device))
        self.low = self.high = 0
        if weight is not None:
            self._start(weight, signed=True)

    def forward(self, v: Tensor) -> Tensor:
        """Weights, or activations of shape (n, ...)."""
        if not self.high:
            if not self.training:
                return v
            self._start(v, signed=bool((v < 0).any()))
        count = v[0].numel() if self.count is None else self.count
        return quantize_with_step(v, self.step, self.low, self.high, count)

    def _start(self, v: Tensor, signed: bool) -> None:
        half = 2 ** (self.bits - 1)
        self.low, self.high = (-half, half - 1) if signed else (0, 2 * half - 1)
        with torch.no_grad():
            self.limits.copy_(torch.tensor([self.low, self.high]))
            self.step.copy_(first_step_size(v, self.high))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.low, self.high = (int(limit) for limit in self.limits)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"bits={self.bits}"
