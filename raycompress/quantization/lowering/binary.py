"""The integer arithmetic of a binary layer: what a kernel of xnor and popcount computes.

torch has no such kernel on CPUs; this says, bit for bit, what one must return.
Shapes: n examples, d inputs, m outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raycompress.quantization.lowering.bits import pack

__all__ = ["pack_signs", "sign_thresholds", "xnor_matmul"]


def pack_signs(signs: Tensor) -> Tensor:
    """Rows of -1 and 1, of shape (n, d), as bits: uint8 of shape (n, ceil(d / 8)), 1 for 1."""
    rows = [pack(row > 0, 1) for row in signs]
    return torch.stack(rows)


def xnor_matmul(inputs: Tensor, weights: Tensor, num: int) -> Tensor:
    """The product inputs @ weights.T of signs, in integers: d - 2 popcount(input xor weight).

    Args:
        inputs: From `pack_signs`, n rows.
        weights: From `pack_signs`, m rows.
        num: d; the spare bits of both are 0, so their xor counts nothing.

    Returns:
        int32 of shape (n, m).
    """
    ones = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int32)
    differing = torch.bitwise_xor(inputs[:, None, :], weights[None, :, :])
    return num - 2 * ones[differing.long()].sum(dim=2, dtype=torch.int32)


def sign_thresholds(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What BatchNorm in eval mode, followed by sign, comes to: a comparison for each channel.

    sign(gamma (x - mu) / sigma + beta) is 1 where x >= mu - beta sigma / gamma if gamma > 0, where
    x <= that if gamma < 0, and sign(beta) everywhere if gamma = 0.

    Returns:
        Thresholds and whether the comparison is turned round, each of shape (C,), in float64 and
        bool. For gamma = 0 the threshold is infinite with the sign that makes it always hold, or
        never.

    Raises:
        ValueError: The norm has no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a norm without running statistics has no fixed thresholds")
    mean, sigma = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
    if norm.affine:
        gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
    else:
        gamma, beta = torch.ones_like(mean), torch.zeros_like(mean)
    never = torch.where(beta >= 0, -torch.inf, torch.inf)
    return torch.where(gamma == 0, never, mean - beta * sigma / gamma), gamma < 0
