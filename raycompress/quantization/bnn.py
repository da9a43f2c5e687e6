"""Binarized networks (Courbariaux et al. 2016, arXiv 1602.02830): weights and inputs of one bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["binarize"]


class _Sign(torch.autograd.Function):
    """sign(x) with sign(0) = 1; the gradient of hard tanh (equation 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # NaN stays: as a sign it would pass for an answer.
        signs: Tensor = torch.where(x < 0, -1.0, torch.where(x >= 0, 1.0, x))
        return signs.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        inside: Tensor = x.abs() <= 1
        return gradient * inside


def binarize(x: Tensor) -> Tensor:
    """1 where x >= 0 and -1 elsewhere; its gradient is 1 where |x| <= 1 and 0 outside."""
    signs: Tensor = _Sign.apply(x)  # type: ignore[no-untyped-call]
    return signs
