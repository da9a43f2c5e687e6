"""Data movement, gating, indexing, reductions and space: slim equals masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pruned import prunable, prune
from torch import Tensor, nn

Part = Callable[..., Tensor]


def images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 8, 8).double(),)


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 5, 6).double(),)


class Between(nn.Module):
    """`part` computes what the last layer reads from the outputs of two others of 16 channels."""

    def __init__(self, part: Part, space: bool, wide: int) -> None:
        super().__init__()
        self.part = part
        if space:
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
            self.head = nn.Conv2d(wide, 2, 1)
            self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
            self.grid, self.gate = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 1, 1)
        else:
            self.a, self.b = nn.Linear(6, 16), nn.Linear(6, 16)
            self.head = nn.Linear(wide, 2)
            self.gate = nn.Linear(6, 1)
        self.small = nn.PReLU(16)
        self.token = nn.Parameter(torch.rand(1, 1, 16))
        self.place = nn.Parameter(torch.rand(9, 16))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self, x, self.a(x), self.b(x)))


def in_place_add(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    half = y.shape[1] // 2
    y[:, :half] += b[:, half:]
    return y


def in_place_copy(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = torch.empty_like(a)
    half = y.shape[1] // 2
    y[:, :half] = b[:, :half]
    y[:, half:] = a[:, half:]
    return y


def in_place_chunks(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    first, _ = y.chunk(2, 1)
    first.mul_(2)
    return y


def in_place_space(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    y[:, :, 0].zero_()
    y[:, :, 2:4] = b[:, :, :2]
    return y


def squeeze_excite(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    gate = m.excite(F.relu(m.squeeze(F.adaptive_avg_pool2d(a, 1))))
    return a * gate.sigmoid() + b


def windows(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = torch.roll((a + b).permute(0, 2, 3, 1), (-1, -1), (1, 2))
    n, h, w, c = y.shape
    y = y.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    y = y - y.mean(1, keepdim=True)
    y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return torch.roll(y, (1, 1), (1, 2)).permute(0, 3, 1, 2)


def merged_patches(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = (a + b).permute(0, 2, 3, 1)
    parts = [y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return torch.cat(parts, -1).permute(0, 3, 1, 2)


def shuffled(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = torch.cat([a, b], 1)
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def pooled(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y, where = F.max_pool2d(a, 2, return_indices=True)
    y = F.max_unpool2d(y, where, 2) + F.interpolate(F.avg_pool2d(b, 2), scale_factor=2)
    return F.adaptive_max_pool2d(y, 3) + F.lp_pool2d(y, 2, 3, stride=2)


def resized(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = sum(F.interpolate(a, scale_factor=2, mode=k) for k in ("nearest", "bilinear", "bicubic"))
    return y + F.interpolate(b, size=(16, 16), mode="area")


def sampled(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    grid = m.grid(x).permute(0, 2, 3, 1).tanh()
    return F.grid_sample(a + b, grid, align_corners=False)


def transformed(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    frequencies = torch.fft.rfft2(a) * torch.fft.rfft2(b).conj()
    return torch.fft.irfft2(frequencies, s=(8, 8))


def spatial_gate(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(m.gate(x) > 0, a, b) * m.gate(x).sigmoid()


IMAGES: dict[str, tuple[Part, int]] = {
    "in-place add": (in_place_add, 16),
    "in-place copy": (in_place_copy, 16),
    "in-place chunks": (in_place_chunks, 16),
    "in-place space": (in_place_space, 16),
    "squeeze-excite": (squeeze_excite, 16),
    "windows": (windows, 16),
    "patch merging": (merged_patches, 64),
    "shuffle": (shuffled, 32),
    "pooling": (pooled, 16),
    "interpolation": (resized, 16),
    "grid sample": (sampled, 16),
    "fourier": (transformed, 16),
    "where": (spatial_gate, 16),
    "pixel shuffle": (lambda m, x, a, b: F.pixel_shuffle(a * b, 2), 4),
    "pixel unshuffle": (lambda m, x, a, b: F.pixel_unshuffle(a * b, 2), 64),
    "channel shuffle": (lambda m, x, a, b: F.channel_shuffle(torch.cat([a, b], 1), 4), 32),
    "unfold and fold": (
        lambda m, x, a, b: F.fold(F.unfold(a * b, 3, padding=1), (8, 8), 3, padding=1), 16,
    ),
    "glu": (lambda m, x, a, b: F.glu(torch.cat([a, b], 1), 1), 16),
    "glu by chunks": (lambda m, x, a, b: torch.mul(*(a * b).chunk(2, 1)), 8),
    "swiglu": (lambda m, x, a, b: F.silu(a) * b, 16),
    "prelu": (lambda m, x, a, b: m.small(a) + b, 16),
    "stack": (lambda m, x, a, b: torch.mul(*torch.stack([a, b], 2).unbind(2)), 16),
    "every second": (lambda m, x, a, b: a[:, ::2] * b[:, 1::2], 8),
    "repeat": (lambda m, x, a, b: (a + b).repeat(1, 2, 1, 1), 32),
    "cat twice": (lambda m, x, a, b: torch.cat([a, b, a], 1), 48),
    "flip": (lambda m, x, a, b: torch.cat([a.flip(3), b.rot90(1, (2, 3))], 1), 32),
}  # fmt: skip


# Channels that the two layers can lose one by one; where they are fewer, the others go along.
CHANNELS = {
    "in-place add": 8, "in-place copy": 8, "in-place chunks": 8, "glu by chunks": 8,
    "every second": 8, "channel shuffle": 8,
    "pixel shuffle": 4,
}  # fmt: skip


def check(
    part: Part, inputs: Callable[[int], tuple[Tensor, ...]], wide: int, channels: int
) -> None:
    images = len(inputs(1)[0].shape) == 4
    structure = prune(Between(part, images, wide), inputs, removed=0, explained=True).structure
    assert not structure.unknown_ops
    used = [n for n in ("a", "b") if f"{n}.weight" not in structure.untouched]
    for name, dim in [*((f"{n}.weight", 0) for n in used), ("head.weight", 1)]:
        assert prunable(structure, name, dim) == 1, structure.frozen
    assert all(g.num_channels >= channels for g in structure.groups if {*g.producers} & {*used})


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    part, wide = IMAGES[name]
    check(part, images, wide, CHANNELS.get(name, 16))


def gathered(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    best = x[..., :1].topk(3, 1).indices
    return a.gather(1, best.expand(-1, -1, a.shape[-1])) + b[:, :3]


def repeated_index(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    best = x[..., :1].argsort(1)[:, :3].repeat(1, 1, a.shape[-1])
    return torch.take_along_dim(a, best, 1) + b[:, :3]


def scattered(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    index = m.order.view(1, 5, 1).expand(a.shape)
    return torch.zeros_like(a).scatter_add(1, index, a) + b.scatter(1, index, a)


def index_added(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return b.index_add(1, m.order, a).index_copy(1, m.order[:2], a[:, :2])


def index_put(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    y[:, [0, 2]] = b[:, :2]
    return y


def experts(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    flat, out = x.flatten(0, 1), torch.zeros_like(a.flatten(0, 1))
    for expert, chosen in ((m.a, flat[:, 0] > 0), (m.b, flat[:, 0] <= 0)):
        rows = chosen.nonzero().flatten()
        out.index_add_(0, rows, expert(flat[rows]))
    return out.view_as(a)


def masked_tokens(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    y[x[..., 0] > 0] = m.token[0, 0]
    return y + b


def class_token(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first = m.token.expand(len(x), -1, -1)
    return torch.cat([first, a * b], 1) + m.place[:6]


def repeated_token(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([m.token.repeat(len(x), 1, 1), a * b], 1)[:, 0]


def normalised(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) + b.softmax(1) + a.cumsum(1)


def attention_pool(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ((a + b) * m.gate(x).softmax(1)).sum(1)


def constants(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    bias = torch.full((a.shape[-1],), 0.5).to(a)
    zero = a.new_zeros(a.shape[0], 1, a.shape[2])
    return torch.cat([zero, a + bias], 1) + F.pad(b, (0, 0, 1, 0))


TOKENS: dict[str, Part] = {
    "gather": gathered, "take along": repeated_index, "scatter": scattered,
    "index add": index_added, "index put": index_put, "experts": experts,
    "masked tokens": masked_tokens, "class token": class_token, "constants": constants,
    "repeated token": repeated_token, "over tokens": normalised, "attention pool": attention_pool,
    "permuted tokens": lambda m, x, a, b: a[:, m.order] + b.index_select(1, m.order),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name: str) -> None:
    check(TOKENS[name], tokens, 16, 16)


def listed(m: Between, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return m.head.weight.new_zeros(1) + a * torch.cdist(b, b).mean()


FROZEN: dict[str, tuple[Part, str, str]] = {
    "index select": (lambda m, x, a, b: a[..., m.order.repeat(4)[:16] * 3], "a", "picked by index"),
    "gather": (
        lambda m, x, a, b: b + a.gather(2, m.order.repeat(4)[:16].expand(a.shape)), "a", "along ch",
    ),
    "sort": (lambda m, x, a, b: a.sort(-1).values + b, "a", "along channels"),
    "fourier": (lambda m, x, a, b: torch.fft.fft(a).real + b, "a", "along channels"),
    "cumsum": (lambda m, x, a, b: a.cumsum(-1) + b, "a", "along channels"),
    "roll": (lambda m, x, a, b: a.roll(3, -1), "a", "rolled"),
    "unknown": (listed, "b", "has no rule"),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_pruned_is_frozen_with_its_reason(name: str) -> None:
    part, layer, reason = FROZEN[name]
    structure = prune(Between(part, False, 16), tokens, removed=0, explained=True).structure
    reasons = {(f.parameter, f.dim): f.reason for f in structure.frozen}
    assert prunable(structure, f"{layer}.weight", 0) == 0
    assert reason in reasons[f"{layer}.weight", 0]
    assert structure.unknown_ops == ({"aten::_cdist_forward": ""} if name == "unknown" else {})
    if name == "unknown":
        assert prunable(structure, "a.weight", 0) == 1
