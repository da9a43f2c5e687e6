"""LSQ (Esser et al. 2020, arXiv 1902.08153): the step size of a quantizer is learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_step_size", "quantize_with_step"]


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
