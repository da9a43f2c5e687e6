"""Movement pruning: scores by hand, the schedule, and what the mask does between steps."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from test_toward import run_of
from torch import nn

from raycompress.errors import ConfigError, TaskError
from raycompress.masks import num_kept
from raycompress.pruning import MovementPruning
from raycompress.search import run_search
from raycompress.testing import PrunerContract, toy_problem
from raycompress.training import Movement


class TestHard(PrunerContract):
    pruner = MovementPruning(sparsity=0.6, epochs=2)


class TestHardWithin(PrunerContract):
    pruner = MovementPruning(epochs=1, retrain_epochs=1)
    budget: ClassVar = {"params": "50%"}


class TestSoft(PrunerContract):
    pruner = MovementPruning(soft=True, epochs=2, score_lr=1.0)


def test_scores_accumulate_minus_gradient_times_weight():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0]])
    run = run_of(model)
    run.num_steps = 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    movement = Movement(
        parameters=("weight",), sparsity=(0.5,), score_lr=0.5, warm_up=0.0, cool_down=0.0
    )
    with movement.around(run):
        model.weight.grad = torch.tensor([[0.4, 0.4]])
        optimizer.step()
        # S = -0.5 * g * w = (-0.2, 0.4): the first shrinks (1 -> 0.96), the second grows.
        # One of two steps: 1 - (1/2)^3 = 7/8 of 50 % of 2 weights is none yet.
        assert torch.allclose(model.weight.data, torch.tensor([[0.96, -2.04]]))
        run.step = 1
        model.weight.grad = torch.tensor([[0.4, 0.4]])
        optimizer.step()
        # The end: the first has the lower score and goes.
        assert torch.allclose(model.weight.data, torch.tensor([[0.0, -2.08]]))
    scores = run.extra["weight.score"]
    assert torch.allclose(scores, torch.tensor([[-0.2 - 0.192, 0.4 + 0.408]]))


def test_masked_weight_gets_no_gradient_and_can_come_back():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0]])
    run = run_of(model)
    run.num_steps = 1  # over at once: the final mask from the first step on
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    movement = Movement(
        parameters=("weight",), sparsity=(0.5,), score_lr=1.0, warm_up=0.0, cool_down=0.0
    )
    with movement.around(run):
        model.weight.grad = torch.tensor([[0.5, -0.5]])
        optimizer.step()  # S = (-0.5, 0.5)
        assert torch.allclose(model.weight.data, torch.tensor([[0.0, 1.05]]))
        model.weight.grad = torch.tensor([[-3.0, 0.0]])
        optimizer.step()
        # S[0] = -0.5 + 3 * 0.95: back, with the weight that it had when it went (0.95).
        assert torch.allclose(model.weight.data, torch.tensor([[0.95, 0.0]]))


def test_schedule_by_hand():
    movement = Movement(parameters=(), warm_up=0.2, cool_down=0.3)
    for progress, expected in ((0.0, 0), (0.2, 0), (0.45, 1 - 0.5**3), (0.7, 1), (1.0, 1)):
        assert movement.reached(progress) == pytest.approx(expected)


def test_result_is_masked_by_the_scores_exactly(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    trials = []
    pruner = MovementPruning(sparsity=0.75, epochs=3)
    winner = run_search(pruner.search(problem), executor, lambda _, step: trials.extend(step))
    stored = executor.host.store.get(trials[0].weights)
    for name, mask in executor.host.masks(winner).items():
        assert int(mask.sum()) == num_kept(mask.numel(), 0.75)
        # Training itself ended with this mask: nothing is lost by applying it.
        assert torch.equal(stored.state[name] != 0, mask)
        scores = stored.extra[f"{name}.score"]
        assert scores[mask].min() >= scores[~mask].max()


def test_soft_pruning_removes_what_scores_low(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    removed = []
    for penalty in (0.0, 50.0):
        pruner = MovementPruning(
            soft=True, epochs=4, score_lr=0.5, threshold=0.4975, penalty=penalty
        )
        winner = run_search(pruner.search(problem), executor)
        masks = executor.host.masks(winner)
        removed.append(sum(int((~m).sum()) for m in masks.values()))
    assert removed[1] > removed[0]


def test_loop_that_reports_no_progress_is_told():
    model = nn.Linear(2, 1)
    with pytest.raises(TaskError, match="never called `progress`"):
        with Movement(parameters=("weight",), sparsity=(0.5,)).around(run_of(model)):
            pass


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"epochs": 0}, "MovementPruning.epochs must be above 0, got 0"),
        ({"warm_up": 0.6, "cool_down": 0.4}, "below 1 together, got 0.6 and 0.4"),
        ({"soft": True, "sparsity": 0.5}, "give soft or sparsity"),
        ({"retrain_epochs": -1}, "must be 0 or more, got -1"),
        ({"threshold": 1.0}, r"MovementPruning.threshold must be in \[0, 1\), got 1"),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        MovementPruning(**keys)
