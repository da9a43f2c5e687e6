"""Small models whose code has sizes written into it, each with one difficulty for graph form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Views(nn.Module):
    """view and reshape with numbers of channels, after a convolution and before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.head = nn.Linear(12, 10), nn.Linear(10 * 64, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x))).view(x.shape[0], 12, 64).transpose(1, 2)
        return self.head(self.drop(self.b(x).relu()).reshape(-1, 640))


class Splits(nn.Module):
    """Parts of equal and unequal size, by split, chunk, slices, narrow and a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 24), nn.Linear(8, 12)
        self.c, self.d = nn.Linear(16, 9), nn.Linear(12, 7)
        self.head = nn.Linear(12 + 4 + 5 + 9 + 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.a(x), [8, 16], -1)
        wide = self.b(first).relu()
        left, right = self.c(second).relu()[:, :5], wide.narrow(1, 2, 4)
        parts = torch.cat([wide, right, left, self.c(second).tanh(), wide[:, ::2]], 1)
        return self.head(parts)


class Halves(nn.Module):
    """Two halves that never meet: each may keep another number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.a(x).relu(), 16, -1)
        return self.b(left) + self.c(right)


class Heads(nn.Module):
    """Attention with 4 heads of 6 written into it, and no scale given."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(10, 72), nn.Linear(24, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], 3, 10)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.view(-1, 3, 4, 6).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 3, 24)
        return self.head((x + self.proj(y)).mean(1))


class Folded(nn.Module):
    """Heads folded into the batch dim: a computed size changes with the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(10, 24) for _ in range(3))
        self.proj = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = x.reshape(n, 3, 10)
        q, k, v = (
            layer(x).view(n, 3, 4, 6).transpose(1, 2).reshape(n * 4, 3, 6)
            for layer in (self.q, self.k, self.v)
        )
        y = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / 6**0.5, -1), v)
        y = y.view(n, 4, 3, 6).transpose(1, 2).reshape(n, 3, 24)
        return self.proj(y).mean(1)


class Shuffled(nn.Module):
    """Channel shuffle by literals, and by a constant permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 3, padding=1, groups=2)
        self.c, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).view(-1, 2, 6, 8, 8).transpose(1, 2).reshape(-1, 12, 8, 8)
        x = self.c(x.relu())[:, torch.tensor([7, 0, 3, 1, 2, 6, 5, 4])]
        return self.head(x.relu().mean((2, 3)))


class Grouped(nn.Module):
    """Numbers of groups that the code gives to group_norm and to a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 1)
        self.weight = nn.Parameter(torch.rand(12, 3, 3, 3))
        self.gain, self.shift = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(self.a(x), 4, self.gain, self.shift).relu()
        return self.head(F.conv2d(x, self.weight, groups=4).relu().mean((2, 3)))


class LayerNormed(nn.Module):
    """layer_norm with a literal shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)
        self.gain = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.layer_norm(self.a(x), (16,), self.gain))


class Created(nn.Module):
    """Tensors of literal sizes: zeros, full, arange, expand and padding meet the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(14, 4)
        self.scale = nn.Parameter(torch.rand(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.a(x) + torch.zeros(n, 8) + torch.full((8,), 0.5) + torch.arange(8.0)
        x = self.b(x.relu()) * self.scale.expand(n, 8) + x.new_ones(1, 8).repeat(1, 1)
        return self.c(F.pad(x, (2, 4)) + torch.linspace(0, 1, 14))


class Recurrent(nn.Module):
    """An LSTM: its initial state has a literal size in the graph; the code picks one step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(10, 7), nn.LSTM(7, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x.view(-1, 3, 10)))[0][:, -1])


class Picked(nn.Module):
    """One channel is picked by its number; the others are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x) * x[:, 5:6] + x[:, 3, None] + x.select(1, 6)[:, None]


class Shortcut(nn.Module):
    """A shortcut without weights: strided and padded to twice the channels, by literals."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.b(x)
        return self.head(x.relu().mean((2, 3)))


class Windows(nn.Module):
    """Attention in shifted windows that are folded into the batch dim, with a table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 1)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table, self.head = nn.Parameter(torch.rand(49, 4)), nn.Linear(16, 4)
        self.register_buffer("places", torch.arange(256).reshape(16, 16) % 49)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.embed(x).permute(0, 2, 3, 1), (-2, -2), (1, 2))
        x = x.view(-1, 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 16)
        n = x.shape[0]
        q, k, v = self.qkv(x).reshape(n, 16, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.get_buffer("places").view(-1)].view(16, 16, 4).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) / 2 + bias).softmax(-1)
        x = self.proj((weights @ v).transpose(1, 2).reshape(n, 16, 16))
        x = x.view(-1, 2, 2, 4, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 64, 16)
        return self.head(x.mean(1))


class Blocks(nn.Module):
    """Blocks that export keeps apart: modes of gradients and of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = torch.arange(12.0).to(x.dtype) * 2
        with torch.autocast("cpu", enabled=False):
            x = self.a(x) * scale
        with torch.enable_grad():
            x = x.view(-1, 3, 4)
        return self.b(x.flatten(1))


class Tied(nn.Module):
    """One parameter under two names, a buffer that isn't saved, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.c.weight = self.a.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b((self.a(x) * self.scale).view(-1, 2, 4).flatten(1).relu())
        return self.head(self.c(x))


IMAGE, ROW, TOKENS = (3, 8, 8), (6,), (30,)
HARDCODED: dict[type[nn.Module], tuple[int, ...]] = {
    Views: IMAGE,
    Splits: ROW,
    Halves: ROW,
    Heads: TOKENS,
    Folded: TOKENS,
    Shuffled: IMAGE,
    Grouped: IMAGE,
    LayerNormed: ROW,
    Created: ROW,
    Recurrent: TOKENS,
    Picked: ROW,
    Shortcut: IMAGE,
    Windows: IMAGE,
    Blocks: ROW,
    Tied: ROW,
}
