"""Attention in all its forms: slim equals masked, and enough is removed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruned import half, masked, prune, randomised
from torch import Tensor, nn

from raycompress.artifacts.recipe import load_recipe, save_recipe
from raycompress.structure import analyze, slim, verify
from raycompress.structure.attention import SlimAttention

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


class Blocks(nn.Module):
    """torch's own transformer layers; only widths inside the blocks are free of norms."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"dim_feedforward": 20, "batch_first": batch_first}
        self.embed = nn.Linear(10, WIDTH)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, **options), 2, enable_nested_tensor=batch_first
        )
        self.decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, **options)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        if not self.batch_first:
            y = y.transpose(0, 1)
        padding = torch.arange(TOKENS) >= 1 + (x[:, 0, :1] > 0) * 3
        memory = self.encoder(y, src_key_padding_mask=padding)
        return self.decoder(y, memory, memory_key_padding_mask=padding)


@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_of_torch_lose_heads_with_and_without_the_fused_path(batch_first: bool) -> None:
    model = randomised(Blocks(batch_first))
    structure = analyze(model, tokens(7), ignore=("embed",), form="module")
    kept = half(structure)
    small = slim(model, structure, kept)
    attentions = [m for m in small.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [m.num_heads for m in attentions] == [2, 2, 2, 2]
    assert all(isinstance(m, SlimAttention) for m in attentions)
    assert small.encoder.layers[0].linear1.out_features == 10
    x, zeroed = tokens(5), masked(model, structure.masks(kept))
    assert verify(zeroed, small, x, structure=structure).kind == "exact"
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            expected = zeroed(*x)
            torch.testing.assert_close(small(*x), expected, rtol=1e-10, atol=1e-10)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_slim_attention_travels_and_trains() -> None:
    model = randomised(Around(False, batch_first=True))
    structure = analyze(model, tokens(7), form="module")
    kept = {"embed": range(5, 24), "attention": [0, 1, 3]}
    small, x = slim(model, structure, kept), tokens(3)
    assert type(small.attention) is SlimAttention
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        torch.testing.assert_close(other(*x), small(*x))
    again = slim(model, structure, kept)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(*x), small(*x))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(small, x, dynamic_shapes=({0: batch},))
    other = tokens(9)
    torch.testing.assert_close(program.module()(*other), small(*other))
    small.train()
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(*x).square().mean().backward()
    optimizer.step()
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        key = f"attention.{name}"
        assert not torch.equal(small.state_dict()[key], before[key])


def test_slim_attention_loads_onto_the_stock_class(tmp_path: Path) -> None:
    model = randomised(Around(False, batch_first=True))
    structure = analyze(model, tokens(7), form="module")
    small = slim(model, structure, {"embed": range(5, 24), "attention": [0, 1, 3]})
    save_recipe(small, tmp_path / "slim.safetensors")
    loaded = load_recipe(tmp_path / "slim.safetensors", Around(False, batch_first=True)).eval()
    x = tokens(3)
    torch.testing.assert_close(loaded(*x), small(*x), rtol=0, atol=0)


def test_unbatched_slim_attention() -> None:
    result = prune(Around(True, batch_first=True), tokens, removed=0.45, explained=True)
    y = torch.randn(TOKENS, result.slim.attention.embed_dim).double()
    out, weights = result.slim.attention(y, y, y)
    batched, more = result.slim.attention(y[None], y[None], y[None], average_attn_weights=False)
    torch.testing.assert_close(out, batched[0])
    torch.testing.assert_close(weights, more[0].mean(0))


def test_uneven_heads_and_stream_keep_the_stock_class_where_it_can_express_them() -> None:
    model = randomised(Around(False))
    structure = analyze(model, tokens(7), form="module")
    stream, heads = structure.group("embed"), structure.group("attention")
    whole = slim(model, structure, {stream.name: range(6, 24), heads.name: [0, 1, 3]})
    assert type(whole.attention) is nn.MultiheadAttention  # 3 heads of 6, a stream of 18
    other = slim(model, structure, {stream.name: range(5, 24), heads.name: [0, 1, 3]})
    assert type(other.attention) is SlimAttention
    assert (other.attention.embed_dim, other.attention.num_heads) == (19, 3)


class Heads(nn.Module):
    """Attention written by hand around `scaled_dot_product_attention`."""

    def __init__(self, mix: Callable[..., Any], queries: int = 4, keys: int = 4) -> None:
        super().__init__()
        self.mix, self.num_heads, self.num_keys, self.head_dim = mix, queries, keys, 6
        self.scale = 6**-0.5
        self.q, self.k, self.v = (nn.Linear(10, n * 6) for n in (queries, keys, keys))
        self.out = nn.Linear(queries * 6, 3)
        self.register_buffer("cos", torch.rand(TOKENS, 3))
        self.register_buffer("sin", torch.rand(TOKENS, 3))
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        return self.out(self.mix(self, q, k, v).transpose(1, 2).flatten(2))


def plain(_m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(_m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)


def grouped(_m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeated(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(m.num_heads // m.num_keys, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def expanded(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (
        t[:, :, None].expand(-1, -1, m.num_heads // m.num_keys, -1, -1).flatten(1, 2)
        for t in (k, v)
    )
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * m.scale).softmax(-1) @ v


def einsum(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * m.scale
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def with_bias(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.full((q.shape[1], TOKENS, TOKENS), -2.0).to(q).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def rotary_halves(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def turn(t: Tensor) -> Tensor:
        cos, sin = (torch.cat([a, a], -1) for a in (m.cos, m.sin))
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    return F.scaled_dot_product_attention(turn(q), turn(k), v)


def rotary_pairs(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def turn(t: Tensor) -> Tensor:
        a, b = t[..., ::2], t[..., 1::2]
        return torch.stack([a * m.cos - b * m.sin, a * m.sin + b * m.cos], -1).flatten(-2)

    return F.scaled_dot_product_attention(turn(q), turn(k), v)


def rotary_complex(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def turn(t: Tensor) -> Tensor:
        number = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(number * torch.complex(m.cos, m.sin)).flatten(-2)

    return F.scaled_dot_product_attention(turn(q), turn(k), v)


def query_gain(m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q * m.gain, k, v)


MIXES: list[tuple[Callable[..., Any], int, int]] = [
    (plain, 4, 4), (causal, 4, 4), (grouped, 8, 4), (repeated, 8, 4), (expanded, 12, 4),
    (by_hand, 4, 4), (einsum, 4, 4), (with_bias, 4, 4), (rotary_halves, 4, 4),
    (rotary_pairs, 4, 4), (rotary_complex, 4, 4), (query_gain, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("heads", ["whole", "dim"])
@pytest.mark.parametrize(("mix", "queries", "keys"), MIXES, ids=lambda v: getattr(v, "__name__", v))
def test_attention_by_hand(mix: Callable[..., Any], queries: int, keys: int, heads: Any) -> None:
    pairs = "rotary" in mix.__name__ and heads == "dim"
    # Of 3 rotary pairs one goes, of 6 positions 3, of 4 heads 2.
    prune(Heads(mix, queries, keys), tokens, removed=0.3 if pairs else 0.4, heads=heads)


def shared(_m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, v) + 0 * k


def normalised(_m: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(F.normalize(q, dim=-1), k, v)


@pytest.mark.parametrize("mix", [shared, normalised])
def test_a_scale_that_cannot_be_folded_freezes_the_width_of_heads(mix: Any) -> None:
    result = prune(Heads(mix), tokens, removed=0, heads="dim", explained=True)
    reasons = {(f.parameter, f.dim): f.reason for f in result.structure.frozen}
    assert "can't be folded" in reasons["q.weight", 0] and not result.structure.query_rows


class OneHead(nn.Module):
    """Attention without heads: queries and keys lose single channels."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.q, self.k, self.v = (nn.Linear(10, n) for n in (12, 12, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=self.scale))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_without_heads(scale: float | None) -> None:
    result = prune(OneHead(scale), tokens, removed=0.45)
    assert (result.slim.q.out_features, result.slim.v.out_features) == (6, 4)
    assert len(result.structure.query_rows) == (2 if scale is None else 0)
