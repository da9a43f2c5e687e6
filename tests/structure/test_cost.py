"""The cost model: hand-computed numbers, torch's own counter, and counting on slim models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import EXACT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from raycompress.errors import StructureError
from raycompress.structure import Cost, Structure, analyze, slim
from raycompress.structure.trace import quiet


class Written(TorchDispatchMode):
    """Bytes of what operators write anew from the inputs; in-place results and views are free."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self.alive = [t.untyped_storage() for t in inputs]  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, got = (
            [t.untyped_storage() for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]
            for tree in ((args, kwargs), out)
        )
        data = {s.data_ptr() for s in self.alive}
        if any(s.data_ptr() in data for s in given):
            there = {s.data_ptr() for s in given}
            self.bytes += sum(s.nbytes() for s in got if s.data_ptr() not in there)
            self.alive += got
        return out


def counted(model: nn.Module, *inputs: Tensor) -> Cost:
    """Counting on a real model, for one example."""
    with quiet(model), FlopCounterMode(display=False) as flops:
        model(*inputs)
    with quiet(model), Written(*inputs) as written:
        model(*inputs)
    batch = len(inputs[0])
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, flops.get_total_flops() // 2 // batch, written.bytes // batch)


def some(structure: Structure, seed: int) -> dict[str, Tensor]:
    """Random channels, a random number of them, for each group."""
    g = torch.Generator().manual_seed(seed)
    kept = {}
    for group in structure.groups:
        n = group.num_channels
        count = int(torch.randint(1, n + 1, (1,), generator=g))
        kept[group.name] = torch.randperm(n, generator=g)[: group.round_up(count)]
    return kept


def check(model: nn.Module, *inputs: Tensor, min_kept: int = 1) -> Structure:
    """Dense and slim models cost what counting on them says."""
    structure = analyze(model, inputs, min_kept=min_kept)
    assert structure.groups
    assert structure.cost() == counted(model, *inputs)
    for seed in range(4):
        kept = some(structure, seed)
        small = slim(model, structure, kept)
        cost = structure.cost({name: len(v) for name, v in kept.items()})
        assert cost == counted(small, *inputs)
    return structure


@pytest.mark.parametrize("architecture", EXACT, ids=lambda c: c.__name__)
def test_any_kept_counts_cost_what_the_slim_model_costs(architecture: type[nn.Module]) -> None:
    # With a single channel left, a transposed tensor is contiguous, and `reshape` copies nothing.
    check(architecture(), torch.zeros(2, 3, 8, 8), min_kept=2)


def test_every_combination_of_counts_of_a_small_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2))
    structure = analyze(model, torch.zeros(5, 3))
    for a, b in itertools.product(range(1, 5), range(1, 4)):
        cost = structure.cost({"0": a, "2": b})
        # Weights and biases; a multiply-add for each weight; float32 outputs of four layers.
        assert cost.params == 3 * a + a + a * b + b + b * 2 + 2
        assert cost.macs == 3 * a + a * b + b * 2
        assert cost.activation_bytes == 4 * (a + a + b + 2)


CONVOLUTIONS = {
    # name: (layers, input, MACs by hand for one example)
    "conv1d": (
        [nn.Conv1d(3, 6, 5, stride=2), nn.Conv1d(6, 4, 3, dilation=2)],
        (2, 3, 21),
        6 * 3 * 5 * 9 + 4 * 6 * 3 * 5,
    ),
    "conv3d": (
        [nn.Conv3d(2, 6, 3), nn.Conv3d(6, 4, 1, bias=False)],
        (1, 2, 5, 6, 4),
        6 * 2 * 27 * 3 * 4 * 2 + 4 * 6 * 3 * 4 * 2,
    ),
    # Each input position of a transposed convolution meets each weight once.
    "transposed": (
        [nn.ConvTranspose2d(3, 6, 2, stride=2), nn.Conv2d(6, 4, 1)],
        (3, 3, 4, 4),
        3 * 6 * 4 * 16 + 6 * 4 * 64,
    ),
    "transposed1d": (
        [nn.Conv1d(3, 6, 1), nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1)],
        (2, 3, 7),
        3 * 6 * 7 + 6 * 4 * 3 * 7,
    ),
    "grouped": (
        [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(16, 4, 1)],
        (2, 3, 6, 6),
        3 * 8 * 36 + 16 * 2 * 9 * 16 + 16 * 4 * 16,
    ),
    "depthwise": (
        [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 4, 1)],
        (2, 3, 6, 6),
        3 * 8 * 36 + 8 * 9 * 16 + 8 * 4 * 16,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    layers, shape, macs = CONVOLUTIONS[name]
    structure = check(nn.Sequential(*layers), torch.zeros(shape))
    assert structure.cost().macs == macs


class Scaled(nn.Module):
    """Multi-head attention by `scaled_dot_product_attention`, width 12 in 3 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12, bias=False) for _ in range(3))
        self.out = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_is_counted() -> None:
    structure = check(Scaled(), torch.zeros(2, 3, 12), min_kept=2)
    # Three tokens: four projections, and q.k and weights.v for each of three heads, then for two.
    assert structure.cost().macs == 4 * 3 * 144 + 3 * 2 * (3 * 3 * 4)
    assert structure.cost({"q": 2}).macs == 4 * 3 * 96 + 2 * 2 * (3 * 3 * 4)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.recurrent = kind(6, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(self.embed(x))[0])

    structure = check(Tagger(), torch.zeros(2, 5, dtype=torch.int64))
    gates = {nn.RNN: 1, nn.LSTM: 4, nn.GRU: 3}[kind]
    # Five steps; looking up an embedding is no multiply-add.
    assert structure.cost().macs == 5 * (gates * 8 * (6 + 8) + 8 * 3)
    table = {r.name: r for r in structure.cost_table()}
    assert (table["embed"].params, table["embed"].macs) == (66, 0)


def test_bias_norms_and_elementwise_work_are_no_multiply_adds() -> None:
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 2)]
    with_bias = analyze(nn.Sequential(*layers), torch.zeros(2, 4))
    without = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False))
    assert with_bias.cost().macs == analyze(without, torch.zeros(2, 4)).cost().macs == 36


def test_tied_weights_count_once_and_work_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.embed(x)).relu())

    structure = analyze(Tied(), torch.zeros(3, 2, dtype=torch.int64))
    assert structure.cost().params == 28 + 20
    assert structure.cost().macs == 2 * (16 + 28)


def test_cost_is_that_of_one_example_at_any_batch_size() -> None:
    model = EXACT[0]()
    costs = {analyze(model, torch.zeros(n, 3, 8, 8)).cost() for n in (1, 2, 7)}
    assert len(costs) == 1


def test_counts_out_of_range_are_refused() -> None:
    structure = analyze(EXACT[0](), torch.zeros(1, 3, 8, 8))
    for count in (-1, 9):
        with pytest.raises(StructureError, match=rf"'0\.0' has 8 channels, asked for {count}"):
            structure.cost({"0.0": count})
