"""Attention in all its forms: slim equals masked, and enough is removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruned import prune
from torch import Tensor, nn

WIDTH, HEADS, TOKENS = 24, 4, 5  # heads of 6


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, TOKENS, 10).double(),)


class Around(nn.Module):
    """Stock attention between layers whose width can change, without norms that forbid exactness.

    The residual stream of width 24 and the heads are pruned independently of each other.
    """

    def __init__(self, need_weights: bool, mask: str = "", **options: Any) -> None:
        super().__init__()
        self.need_weights, self.mask = need_weights, mask
        self.embed, self.other = nn.Linear(10, WIDTH), nn.Linear(10, 14)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.head = nn.Linear(WIDTH, 3)
        self.separate = "kdim" in options

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        k = self.other(x) if self.separate else y
        first = self.attention.batch_first
        q, k = (y, k) if first else (y.transpose(0, 1), k.transpose(0, 1))
        options: dict[str, Any] = {}
        if "causal" in self.mask:
            ones = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=x.device)
            options = {"attn_mask": ones.triu(1)}
        if "float" in self.mask:
            options = {"attn_mask": torch.zeros(TOKENS, TOKENS).to(x).fill_diagonal_(-1.5)}
        if "padding" in self.mask:
            options["key_padding_mask"] = (x[..., 0] > 0.5) & (torch.arange(TOKENS) > 0)
        z, _ = self.attention(q, k, k, need_weights=self.need_weights, **options)
        return self.head(y + (z if first else z.transpose(0, 1)))


OPTIONS: list[dict[str, Any]] = [
    {}, {"batch_first": True}, {"bias": False}, {"kdim": 14, "vdim": 14}, {"add_bias_kv": True},
    {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "stock")
@pytest.mark.parametrize("heads", ["whole", "dim"])
def test_stock_attention_loses_heads(
    options: dict[str, Any], need_weights: bool, heads: Any
) -> None:
    result = prune(
        Around(need_weights, **options), tokens, removed=0.45, heads=heads, explained=need_weights
    )
    attention = result.slim.attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert (attention.num_heads, attention.head_dim) == ((2, 6) if heads == "whole" else (4, 3))
    assert attention.state_dict().keys() == result.dense.attention.state_dict().keys()


@pytest.mark.parametrize("mask", ["causal", "float", "padding", "causal+padding", "float+padding"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{"batch_first": True}, {"add_bias_kv": True}], ids=str)
def test_stock_attention_with_masks(mask: str, need_weights: bool, options: dict[str, Any]) -> None:
    prune(Around(need_weights, mask, **options), tokens, removed=0.45, explained=need_weights)
