"""One model of each kind that makes saving difficult, with an input of two examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(12 * 36, 10), nn.ReLU(), nn.Linear(10, 4)),
        )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + F.relu(self.norm(self.same(x)))).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 24, 3, groups=4)
        self.deep, self.up = nn.Conv2d(24, 24, 1, groups=24), nn.ConvTranspose2d(24, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.deep(F.relu(self.grouped(F.relu(self.stem(x))))))


class Attention(nn.Module):
    """Heads by attributes of its own, sizes in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.proj, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, t, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.proj(out.reshape(b, t, self.num_heads * self.head_dim))
        return x + self.down(F.gelu(self.up(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(6, 8), nn.LSTM(8, 10, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, 12), nn.Linear(12, 9)
        self.back, self.head = nn.Linear(9, 12), nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(F.relu(self.hidden(self.embed(x)))))


class Odd(nn.Module):
    """A ParameterList, frozen weights, buffers that aren't persistent, shared modules."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.body = nn.Linear(6, width)
        self.also = self.body
        self.gains = nn.ParameterList([torch.rand(width), torch.rand(width)])
        self.register_buffer("shift", torch.rand(width), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("nothing", None)
        self.head = nn.Linear(width, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) * self.gains[0] + self.also(x) * self.gains[1]
        return self.head(F.relu(x + self.shift)) * self.steps


class Multihead(nn.Module):
    """Its heads get sizes that the stock class can't express."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class LastBatch(nn.Module):
    """Keeps numbers and tensors of its last call, and what it computed in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.cached: Tensor | None = None

    def train(self, mode: bool = True) -> LastBatch:
        self.cached = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.last_batch = x.shape[0]
        if self.training or self.cached is None:
            self.cached = self.layer.weight * 2
        return self.head(F.linear(x, self.cached, self.layer.bias))


KINDS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "ConvNet": (ConvNet, torch.randn(2, 3, 8, 8)),
    "Residual": (Residual, torch.randn(2, 3, 8, 8)),
    "Grouped": (Grouped, torch.randn(2, 3, 8, 8)),
    "Attention": (Attention, torch.randn(2, 5, 16)),
    "Recurrent": (Recurrent, torch.randn(2, 5, 6)),
    "Tied": (Tied, torch.randint(0, 11, (2, 5))),
    "Odd": (Odd, torch.randn(2, 6)),
    "Multihead": (Multihead, torch.randn(2, 5, 16)),
}
