"""Convolutions, recurrent layers, embeddings and products: slim equals masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruned import prune
from torch import Tensor, nn

Inputs = Callable[[int], tuple[Any, ...]]
CONVOLUTIONS: dict[int, tuple[Any, Any, tuple[int, ...]]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d, (9,)),
    2: (nn.Conv2d, nn.ConvTranspose2d, (7, 9)),
    3: (nn.Conv3d, nn.ConvTranspose3d, (5, 6, 5)),
}


class Chain(nn.Module):
    """A layer between two others, whose channels can go."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def around(rank: int, layer: nn.Module, wide: int = 16) -> Chain:
    conv = CONVOLUTIONS[rank][0]
    return Chain(conv(3, 8, 3, padding=1), layer, conv(wide, 2, 1))


def images(rank: int) -> Inputs:
    return lambda batch: (torch.randn(batch, 3, *CONVOLUTIONS[rank][2]).double(),)


def rows(width: int) -> Inputs:
    return lambda batch: (torch.randn(batch, 5, width).double(),)


def ids(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 11, (batch, 5)),)


# Half of everything inside: of the weights of `layer` a quarter is left, of the others half.
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ({"stride": 2, "dilation": 2, "padding": 2}, 0.6),
        ({"padding": "same"}, 0.6),
        ({"padding": 1, "padding_mode": "reflect"}, 0.6),
        ({"padding": 1, "padding_mode": "replicate"}, 0.6),
        ({"padding": 1, "padding_mode": "circular"}, 0.6),
        ({"groups": 2, "bias": False}, 0.45),
        ({"groups": 4, "stride": 2}, 0.45),
        ({"groups": 8}, 0.45),
    ],
    ids=str,
)
def test_convolution(rank: int, options: dict[str, Any], removed: float) -> None:
    layer = CONVOLUTIONS[rank][0](8, 16, 3, **options)
    prune(around(rank, layer), images(rank), removed=removed)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ({"stride": 2, "padding": 1, "output_padding": 1}, 0.6),
        ({"dilation": 2, "bias": False}, 0.6),
        ({"groups": 2, "stride": 2}, 0.45),
        ({"groups": 4}, 0.45),
        ({"groups": 8}, 0.45),
    ],
    ids=str,
)
def test_transposed_convolution(rank: int, options: dict[str, Any], removed: float) -> None:
    layer = CONVOLUTIONS[rank][1](8, 16, 3, **options)
    prune(around(rank, layer), images(rank), removed=removed)


@pytest.mark.parametrize("norm", ["groups", "single", "instance", "tracked", "bare"])
def test_norms_that_stay_exact(norm: str) -> None:
    layer = {
        "groups": nn.GroupNorm(4, 8),
        "single": nn.GroupNorm(8, 8),
        "bare": nn.GroupNorm(4, 8, affine=False),
        "instance": nn.InstanceNorm2d(8, affine=True),
        "tracked": nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    }[norm]
    result = prune(around(2, layer, 8), images(2), removed=0.45)
    assert result.structure.groups[0].num_channels == (4 if norm in ("groups", "bare") else 8)


class Recurrent(nn.Module):
    def __init__(self, kind: Any, last: bool, **options: Any) -> None:
        super().__init__()
        self.embed, self.last = nn.Linear(4, 8), last
        self.layer = kind(8, 12, **options)
        width = options.get("proj_size", 12)
        ways = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(width if last else width * ways, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.layer(self.embed(x))
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(hidden[-1] if self.last else out)


RECURRENT: list[dict[str, Any]] = [
    {}, {"num_layers": 2}, {"bidirectional": True}, {"bias": False},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
]  # fmt: skip
PROJECTED: list[dict[str, Any]] = [
    {"proj_size": 5}, {"proj_size": 5, "num_layers": 2, "bidirectional": True, "batch_first": True},
]  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(k, o) for k in (nn.RNN, nn.GRU, nn.LSTM) for o in RECURRENT]
    + [(nn.LSTM, o) for o in PROJECTED],
    ids=lambda v: getattr(v, "__name__", "-".join(v) if isinstance(v, dict) else v),
)
def test_recurrent(kind: Any, options: dict[str, Any], last: bool) -> None:
    def inputs(batch: int) -> tuple[Any, ...]:
        shape = (batch, 6, 4) if options.get("batch_first") else (6, batch, 4)
        return (torch.randn(shape).double(),)

    result = prune(Recurrent(kind, last, **options), inputs, removed=0.55)
    layer = result.slim.layer
    assert (layer.input_size, layer.hidden_size) == (4, 6)
    assert layer.proj_size == (3 if "proj_size" in options else 0)
    # In single precision oneDNN runs a whole layer at once; it reads the sizes from the module.
    assert torch.backends.mkldnn.enabled
    small, dense = (copy.deepcopy(m).float() for m in (result.slim, result.masked))
    x = inputs(4)[0].float()
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-4)
    small.train()
    small(x).square().mean().backward()
    used = [p for n, p in small.named_parameters() if not (last and "reverse" in n)]
    assert all(p.grad is not None for p in used)


class Cell(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(4, 8), kind(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(self.embed(x[:, t]), state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells(kind: Any) -> None:
    result = prune(Cell(kind), rows(4), removed=0.55)
    assert (result.slim.cell.input_size, result.slim.cell.hidden_size) == (4, 6)


class ConvRecurrent(nn.Module):
    """A state that the code makes itself, sized by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 12
        self.gates, self.head = nn.Conv2d(3 + 12, 48, 3, padding=1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.hidden, *x.shape[2:]).to(x)
        c = torch.zeros_like(h)
        for _ in range(2):
            i, f, o, g = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def test_states_made_by_the_code() -> None:
    result = prune(ConvRecurrent(), images(2), removed=0.6)
    assert result.slim.hidden == 6


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(11, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, x: Tensor, *offsets: Tensor) -> Tensor:
        return self.head(self.table(x, *offsets))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags(mode: str) -> None:
    prune(Bags(mode), ids, removed=0.45)
    prune(
        Bags(mode),
        lambda b: (torch.randint(0, 11, (b * 5,)), torch.arange(0, b * 5, 5)),
        removed=0.45,
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(self.table(x))))


def test_tied_embeddings_stay_tied() -> None:
    result = prune(Tied(), ids, removed=0.45)
    assert result.slim.head.weight is result.slim.table.weight
    assert (result.slim.head.in_features, result.slim.table.embedding_dim) == (4, 4)


class Repeated(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.same, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.same(F.relu(self.same(self.a(x)))))


def test_shared_layers() -> None:
    prune(Repeated(), rows(6), removed=0.5)


class Products(nn.Module):
    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.product = product
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 10)
        self.three, self.two = (nn.Parameter(torch.rand(s)) for s in ((8, 10, 3), (8, 4, 5)))
        self.back, self.matrix = (nn.Parameter(torch.rand(s)) for s in ((4, 5, 3), (8, 3)))
        self.bilinear, self.head = nn.Bilinear(8, 10, 3), nn.Linear(80, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, self.a(x), self.b(x))


PRODUCTS: dict[str, tuple[Callable[..., Tensor], float]] = {
    "linear": (lambda m, a, b: torch.einsum("btc,cd->btd", a, m.matrix), 0.06),
    "bilinear": (lambda m, a, b: torch.einsum("bti,ijk,btj->btk", a, m.three, b), 0.2),
    "heads": (
        lambda m, a, b: torch.einsum(
            "bthd,hde->bte", torch.einsum("btc,chd->bthd", a, m.two), m.back
        ),
        0.15,
    ),
    "tensordot": (lambda m, a, b: torch.tensordot(a, m.matrix, dims=([2], [0])), 0.06),
    "matmul": (lambda m, a, b: a @ m.matrix, 0.06),
    "batched": (lambda m, a, b: (a.transpose(1, 2) @ b).flatten(1) @ m.head.weight.T, 0.1),
    "outer": (lambda m, a, b: m.head(torch.einsum("bti,btj->btij", a, b).flatten(2)), 0.1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    product, removed = PRODUCTS[name]
    prune(Products(product), rows(6), removed=removed)


def test_bilinear_layers() -> None:
    result = prune(Products(lambda m, a, b: m.bilinear(a, b)), rows(6), removed=0.2, macs=False)
    assert (result.slim.bilinear.in1_features, result.slim.bilinear.in2_features) == (4, 5)
    macs = {r.name: r.macs for r in result.structure.cost_table()}
    assert macs["bilinear"] == 5 * 8 * 10 * 3
