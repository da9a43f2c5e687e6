"""Small integers in as many bits as they need, without a gap between them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_bytes", "unpack"]

_CHUNK = 1 << 20  # codes at a time, a multiple of 8: their bits are spread out to a byte each


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes; the lowest bit of the first code is the lowest bit of the first byte.

    Args:
        codes: Integers in [0, 2^bits), any shape; taken in row-major order.
        bits: 1 to 8.

    Returns:
        uint8 of shape (packed_bytes(codes.numel(), bits),); spare bits at the end are 0.

    Raises:
        ValueError: A code needs more bits, or `bits` is out of range.
    """
    _check(bits)
    flat = codes.detach().cpu().flatten()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise ValueError(
            f"codes of {bits} bits must be in [0, {2**bits - 1}], got "
            f"{int(flat.min())} to {int(flat.max())}"
        )
    places = torch.arange(bits)
    parts = []
    for part in torch.split(flat.to(torch.int32), _CHUNK):
        spread = ((part[:, None] >> places) & 1).flatten()
        spread = torch.nn.functional.pad(spread, (0, -spread.numel() % 8))
        parts.append((spread.view(-1, 8) << torch.arange(8)).sum(dim=1).to(torch.uint8))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: What `pack` returned.
        bits: 1 to 8.
        count: Number of codes.

    Returns:
        uint8 of shape (count,).

    Raises:
        ValueError: The bytes aren't as many as that takes, or `bits` is out of range.
    """
    _check(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes of uint8, got "
            f"{packed.dtype} of shape {tuple(packed.shape)}"
        )
    parts = []
    for part in torch.split(packed.to(torch.int32), _CHUNK // 8 * bits):
        spread = ((part[:, None] >> torch.arange(8)) & 1).flatten()
        spread = spread[: spread.numel() // bits * bits].view(-1, bits)
        parts.append((spread << torch.arange(bits)).sum(dim=1).to(torch.uint8))
    codes = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
    return codes[:count]


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, got {bits}")
