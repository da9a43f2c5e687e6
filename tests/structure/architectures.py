"""Small architectures that each hold one structural difficulty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(i: int, o: int, k: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU()
    )


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv_bn(3, 8),
            nn.MaxPool2d(2),
            conv_bn(8, 12),
            nn.Flatten(),
            nn.Linear(12 * 16, 20),
            nn.ReLU(),
            nn.Linear(20, 5),
        )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.a, self.b = conv_bn(8, 6), nn.Conv2d(6, 8, 3, padding=1)
        self.down, self.c = nn.Conv2d(8, 10, 1, stride=2), nn.Conv2d(8, 10, 3, 2, 1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.b(self.a(x)))
        x = F.relu(self.down(x) + self.c(x))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 6), conv_bn(3, 5)
        self.c = conv_bn(6 + 5 + 6, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        x = self.c(torch.cat([a, self.b(x), a], 1))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.dw, self.pw = conv_bn(8, 8, groups=8), conv_bn(8, 12, 1)
        self.multiplied = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.multiplied(self.pw(self.dw(self.stem(x))))).mean((2, 3))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = conv_bn(3, 12), conv_bn(12, 24, groups=4)
        self.up = nn.ConvTranspose2d(24, 10, 2, stride=2)
        self.head = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.grouped(self.stem(x))))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.same(F.relu(self.same(x))))
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.spatial = nn.Conv2d(8, 1, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = x * gate.sigmoid() * self.spatial(x).sigmoid() * self.scale
        return self.head(x.mean((2, 3)))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.branch = conv_bn(8, 8)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean((2, 3)))


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(3, 24, 3, padding=1)
        self.head = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.pixel_shuffle(self.up(x), 2))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(b, t, self.num_heads * self.head_dim))


class Transformer(nn.Module):
    """Post-norm-free blocks, so that slim equals masked; LayerNorm is tested on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(torch.rand(1, 4, 16))
        self.attention = Attention(16, 4)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.attention(x)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


EXACT = [
    Plain, Residual, Concat, Separable, Grouped, Shared, SqueezeExcite, Shuffle, PixelShuffle,
    Transformer, Normed,
]  # fmt: skip
