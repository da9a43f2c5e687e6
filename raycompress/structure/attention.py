"""nn.MultiheadAttention with any number of heads of any width.

The stock module computes the width of its heads from the width of what it reads, so it can't
express attention that lost heads while the residual stream stayed, or the other way round. Where
that happens the module of a slim model gets the class `SlimAttention`: the same call, the same
parameters under the same names, trainable, exportable. Nothing else about the module changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SlimAttention", "fit_attention"]


class SlimAttention(nn.MultiheadAttention):
    """Attention whose heads don't add up to its embedding dim.

    `in_proj_weight` has shape (num_heads * (2 * head_dim + value_dim), embed_dim), and
    `out_proj.weight` (embed_dim, num_heads * value_dim). Scores are divided by the root of
    `head_dim`. Made by `fit_attention`; it has no constructor of its own.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint: it needs attn_mask")
        batched = query.dim() == 3
        same = query is key and key is value
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._projected(query, key, value, same)
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
            added += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            added += 1
        mask = _merged(attn_mask, key_padding_mask, query, added)
        # (batch, heads, length, width of a head)
        q, k, v = (t.view(*t.shape[:2], self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
            if average_attn_weights:
                weights = weights.mean(dim=1)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.head_dim**-0.5)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, same: bool
    ) -> tuple[Tensor, ...]:
        inner = self.num_heads * self.head_dim
        widths = [inner, inner, self.out_proj.weight.shape[1]]
        if self.in_proj_weight is not None and same:
            return torch.split(F.linear(query, self.in_proj_weight, self.in_proj_bias), widths, -1)
        if self.in_proj_weight is not None:
            parts: tuple[Tensor, ...] = torch.split(self.in_proj_weight, widths)
        else:
            assert self.q_proj_weight is not None
            assert self.k_proj_weight is not None and self.v_proj_weight is not None
            parts = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (
            (None,) * 3 if self.in_proj_bias is None else torch.split(self.in_proj_bias, widths)
        )
        return tuple(
            F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True)
        )


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, added: int
) -> Tensor | None:
    """Both masks as one to add to the scores, for `added` more keys that all may see."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, query)
        # one for each head of each example, or one for all
        mask = mask.view(query.shape[0], -1, *mask.shape[1:]) if mask.dim() == 3 else mask
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, query)[:, None, None]
        mask = padding if mask is None else mask + padding
    return F.pad(mask, (0, added)) if mask is not None and added else mask


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))


def fit_attention(model: nn.Module) -> None:
    """Gives each nn.MultiheadAttention whose sizes the stock class can't express one that can.

    Only the stock class is replaced, not what users derived from it.

    Args:
        model: with the numbers of heads and their widths already right.
    """
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and not _is_stock(module):
            module.__class__ = SlimAttention
            # With this, torch's encoder layers never take the fused path, which needs stock sizes.
            module._qkv_same_embed_dim = False
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, SlimAttention) for m in module.modules()
        ):
            module.use_nested_tensor = False


def _is_stock(module: nn.MultiheadAttention) -> bool:
    """Whether the sizes are such that the stock class computes with them rightly."""
    width = module.num_heads * module.head_dim
    if module.in_proj_weight is not None:
        rows = [len(module.in_proj_weight) / 3]
    else:
        assert module.q_proj_weight is not None and module.v_proj_weight is not None
        rows = [float(len(module.q_proj_weight)), float(len(module.v_proj_weight))]
    return all(n == width for n in (*rows, module.out_proj.weight.shape[1], module.embed_dim))
