"""Single weights: exact counts, one threshold, n:m, rows, blocks."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raycompress.collect import Probe
from raycompress.criteria import LAMP as Lamp
from raycompress.criteria import Wanda as WandaScores
from raycompress.errors import BudgetError, ConfigError
from raycompress.masks import prune_order
from raycompress.pruning import LAMP, FineGrained, Level, Wanda
from raycompress.pruning.patterns import pattern_of
from raycompress.search import run_search
from raycompress.structure import analyze
from raycompress.targets import Target
from raycompress.testing import PrunerContract, ToyTask, toy_problem


class TestLevel(PrunerContract):
    pruner = Level(sparsity=0.5)


class TestGlobal(PrunerContract):
    pruner = Level(sparsity=0.9, scope="global")


class TestRowsWithin(PrunerContract):
    pruner = Level(pattern="row")
    budget: ClassVar = {"params": "40%"}


class TestLAMP(PrunerContract):
    pruner = LAMP()
    budget: ClassVar = {"params": "30%"}


class TestWanda(PrunerContract):
    pruner = Wanda(sparsity=0.5)


class TestTwoOfFour(PrunerContract):
    pruner = FineGrained(criterion="wanda", pattern="2:4")


class TestBlocks(PrunerContract):
    pruner = Level(sparsity=0.5, pattern="block 4x2")


def _masks(pruner, tmp_path, budget=None, **changes):
    problem, executor = toy_problem(str(tmp_path), budget)
    problem = replace(problem, **changes)
    winner = run_search(pruner.search(problem), executor)
    return problem, executor.host.masks(winner)


def test_level_is_exact_under_ties(tmp_path):
    problem, _ = toy_problem(str(tmp_path))
    with torch.no_grad():
        problem.model.get_parameter("conv1.weight").fill_(1.0)
        weight = problem.model.get_parameter("conv2.weight")
        weight.view(-1)[: int(0.6 * weight.numel())] = 0
    problem, masks = _masks(Level(sparsity=0.5), tmp_path / "x", model=problem.model)
    for name in ("conv1.weight", "conv2.weight"):
        assert int(masks[name].sum()) == masks[name].numel() - masks[name].numel() // 2


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 6, 3),
        nn.Linear(16, 5),
        nn.ConvTranspose2d(8, 6, 2),
        nn.Conv1d(8, 8, 3, groups=2),
    ],
)
def test_two_of_four_along_the_inputs(module):
    pattern = pattern_of("2:4", "key")
    transposed = isinstance(module, nn.ConvTranspose2d)
    assert pattern.fits(module)
    scores = torch.rand(module.weight.shape)
    arranged = pattern.arrange(module, scores)
    gone = prune_order(arranged)[: pattern.num_removed(module, scores, 0.5)]
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[gone] = False
    mask, values = (t.view_as(scores) for t in (mask, scores))
    if transposed:
        mask, values = mask.transpose(0, 1), values.transpose(0, 1)
    # By hand, one output and kernel place at a time.
    mask, values = (
        t.flatten(2).permute(0, 2, 1) if t.dim() > 2 else t[:, None] for t in (mask, values)
    )
    for output in range(mask.shape[0]):
        for place in range(mask.shape[1]):
            for start in range(0, mask.shape[2], 4):
                kept = mask[output, place, start : start + 4]
                four = values[output, place, start : start + 4]
                assert int(kept.sum()) == 2
                assert four[kept].min() >= four[~kept].max()


@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([1, 3]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.floats(0, 0.99),
    st.integers(0, 99),
)
def test_blocks_against_brute_force(outputs, inputs, kernel, high, wide, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Conv1d(inputs, outputs, kernel)
    scores = torch.randint(4, module.weight.shape, generator=generator).double()
    pattern = pattern_of(f"block {high}x{wide}", "key")
    gone = set(
        prune_order(pattern.arrange(module, scores))[
            : pattern.num_removed(module, scores, sparsity)
        ].tolist()
    )
    blocks = [
        (float(scores[o : o + high, i : i + wide].sum()), o, i)
        for o in range(0, outputs, high)
        for i in range(0, inputs, wide)
    ]
    index = torch.arange(scores.numel()).view_as(scores)
    expected: set[int] = set()
    for _, o, i in sorted(blocks)[: math.floor(len(blocks) * sparsity + 1e-9)]:
        expected |= set(index[o : o + high, i : i + wide].flatten().tolist())
    assert gone == expected


@given(st.floats(0, 0.99), st.integers(1, 9), st.integers(1, 9))
def test_rows_lose_the_same_number(sparsity, outputs, inputs):
    module = nn.Linear(inputs, outputs)
    scores = torch.rand(outputs, inputs)
    pattern = pattern_of("row", "key")
    gone = prune_order(pattern.arrange(module, scores))[
        : pattern.num_removed(module, scores, sparsity)
    ]
    counts = torch.bincount(gone // inputs, minlength=outputs)
    assert (counts == math.floor(inputs * sparsity + 1e-9)).all()
    mask = torch.ones(outputs * inputs, dtype=torch.bool)
    mask[gone] = False
    for row, kept in zip(scores, mask.view(outputs, inputs), strict=True):
        if kept.any() and not kept.all():
            assert row[kept].min() >= row[~kept].max()


def test_lamp_by_hand():
    # Squares 1, 4, 9: scores 1/14, 4/13, 9/9.
    scores = Lamp().score(torch.tensor([[2.0, -1.0], [3.0, 3.0]]))
    # Squares ascending 1, 4, 9, 9: 1/23, 4/22, 9/18, 9/9.
    assert torch.allclose(scores, torch.tensor([[4 / 22, 1 / 23], [0.5, 1.0]], dtype=torch.float64))
    weight = torch.randn(50)
    assert torch.equal(prune_order(Lamp().score(weight)), prune_order(weight.abs()))
    assert torch.allclose(Lamp().score(weight), Lamp().score(3 * weight))
    assert float(Lamp().score(weight).max()) == 1.0


def test_wanda_norms_are_those_of_the_unfolded_inputs():
    convolution = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    task = ToyTask()
    images = [torch.randn(3, 4, 9, 9), torch.randn(2, 4, 9, 9)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution

        def forward(self, x):
            return self.conv(x)

    net = Net()
    probe = Probe(
        model=net,
        structure=analyze(net, (images[0],)),
        task=task,
        device=torch.device("cpu"),
        batches=lambda: iter([[image, None] for image in images]),
    )
    sums = WandaScores().collect(probe)["conv"]
    squares = torch.cat(images).double().square()
    columns = nn.functional.unfold(squares, 3, dilation=2, padding=1, stride=2)
    expected = columns.sum(dim=(0, 2)).view(4, 3, 3)
    assert torch.allclose(sums, expected)
    scores = WandaScores().weight_scores("conv", convolution.weight.detach(), {"conv": sums})
    # Outputs 0-2 read inputs 0-1, outputs 3-5 inputs 2-3.
    for output in range(6):
        norms = expected[:2] if output < 3 else expected[2:]
        assert torch.allclose(
            scores[output], convolution.weight[output].detach().abs().double() * norms.sqrt()
        )


def test_wanda_with_unit_inputs_is_magnitude_by_row():
    weight = torch.randn(5, 8)
    scores = WandaScores().weight_scores("fc", weight, {"fc": torch.ones(8)})
    assert torch.allclose(scores, weight.abs().double())


def test_wanda_statistics_dont_depend_on_the_batches(tmp_path):
    task = ToyTask()
    problem, _ = toy_problem(str(tmp_path))
    data = task.dataset("calibration")

    def sums(size: int):
        return WandaScores().collect(
            Probe(
                model=problem.model,
                structure=problem.structure,
                task=task,
                device=torch.device("cpu"),
                batches=lambda: task.batches(data, range(len(data)), size, "cpu"),
            )
        )

    whole, parts = sums(96), sums(7)
    for name, total in whole.items():
        assert torch.allclose(total, parts[name], rtol=1e-10)


def test_budget_of_rows_is_met_though_each_row_is_rounded(tmp_path):
    problem, masks = _masks(Level(pattern="row"), tmp_path, {"params": "37%"})
    total = sum(p.numel() for p in problem.model.parameters())
    gone = sum(int((~m).sum()) for m in masks.values())
    assert total - gone <= 0.37 * total


def test_layers_that_dont_fit_are_named_and_left_whole(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, masks = _masks(Level(pattern="2:4"), tmp_path)
    assert "conv1.weight" not in masks and "conv3.weight" in masks
    assert "left whole: conv1" in caplog.text
    only = (Target(op_names=("conv1",)),)
    with pytest.raises(ConfigError, match="can be cut into groups of 4"):
        _masks(Level(pattern="2:4"), tmp_path / "x", targets=only)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattern": "4:2"}, r"Level.pattern must be '', 'row', 'n:m' with 0 < n < m"),
        ({"pattern": "2:4", "sparsity": 0.7}, "Level.sparsity is 0.5 with pattern '2:4', got 0.7"),
        ({"scope": "global", "pattern": "row"}, "pattern 'row' is for scope 'layer' alone"),
        ({"scope": "all"}, "Level.scope must be 'layer' or 'global', got 'all'"),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        Level(**keys)
    with pytest.raises(TypeError, match="criterion"):
        Level(criterion="lamp")


def test_what_cant_be_met_is_refused(tmp_path):
    for number, (pruner, budget, error, message) in enumerate(
        [
            (Level(), {"params": "0.1%"}, BudgetError, "with one weight left in each"),
            (Level(), {"macs": "50%"}, ConfigError, "saves parameters alone"),
            (Level(pattern="2:4"), {"params": "60%"}, ConfigError, "fixes the sparsity"),
        ]
    ):
        problem, _ = toy_problem(str(tmp_path / str(number)), budget)
        with pytest.raises(error, match=message):
            pruner.check(problem)
