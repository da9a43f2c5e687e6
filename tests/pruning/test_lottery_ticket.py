"""Lottery tickets: survivors are bit-equal to where they began."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from raycompress.candidate import Candidate, Training
from raycompress.errors import ConfigError
from raycompress.masks import num_kept
from raycompress.pruning import Iterative, LotteryTicket
from raycompress.pruning.lottery_ticket import reinitialised
from raycompress.search import run_search
from raycompress.testing import PrunerContract, ToyTask, toy_problem


class TestTicket(PrunerContract):
    pruner = LotteryTicket(sparsity=0.7, rounds=2)


class TestIterative(PrunerContract):
    pruner = Iterative(rounds=2)
    budget: ClassVar = {"macs": "50%"}
    gradual = True


class TestIterativeWeights(PrunerContract):
    pruner = Iterative(criterion="level", sparsity=0.6, rounds=2, schedule="geometric")


def _run(tmp_path, pruner):
    problem, executor = toy_problem(str(tmp_path))
    trials = []
    winner = run_search(pruner.search(problem), executor, lambda _, step: trials.extend(step))
    return problem, executor, trials, winner


def test_survivors_are_rewound_to_the_bit(tmp_path):
    problem, executor, trials, winner = _run(tmp_path, LotteryTicket(sparsity=0.8, rounds=3))
    assert len(trials) == 4 and trials[0].candidate == Candidate(
        problem.weights, training=Training(1.0, None, 0)
    )
    initial = problem.model.state_dict()
    before = None
    for number, trial in enumerate(trials[1:], 1):
        untrained = executor.host.build(trial.candidate.with_training(None)).state_dict()
        for layer in ("conv1", "conv2", "conv3", "fc"):
            name = f"{layer}.weight"
            alive = untrained[name] != 0
            assert torch.equal(untrained[name][alive], initial[name][alive])
            size = alive.numel()
            assert int(alive.sum()) == num_kept(size, 1 - 0.2 ** (number / 3))
        assert torch.equal(untrained["bn1.running_mean"], initial["bn1.running_mean"])
        alive = untrained["conv3.weight"] != 0
        assert before is None or not (alive & ~before).any()
        before = alive
        # The mask comes from what was trained last, not from the initial weights.
    trained = executor.host.store.get(trials[-2].weights).state["conv3.weight"]
    mask = executor.host.masks(winner)["conv3.weight"]
    assert trained[mask].abs().min() >= trained[~mask].abs().max()


def test_round_0_is_the_dense_run_to_the_bit(tmp_path):
    _, executor, trials, _ = _run(tmp_path, LotteryTicket(sparsity=0.8, rounds=1, epochs=2))
    task = ToyTask()
    model = task.build_model()
    before = torch.get_num_threads()
    torch.set_num_threads(executor.host.evaluation.threads)  # the last bits depend on it
    try:
        task.train(model, epochs=2, seed=0)
    finally:
        torch.set_num_threads(before)
    found = executor.host.store.get(trials[0].weights).state
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_rewinding_to_a_step(tmp_path):
    pruner = LotteryTicket(sparsity=0.5, rounds=1, rewind_steps=2)
    problem, executor, trials, _ = _run(tmp_path, pruner)
    early = executor.host.store.get(trials[0].weights).state
    assert trials[0].candidate.training.steps == 2
    untrained = executor.host.build(trials[-1].candidate.with_training(None)).state_dict()
    alive = untrained["conv3.weight"] != 0
    assert torch.equal(untrained["conv3.weight"][alive], early["conv3.weight"][alive])
    assert not torch.equal(early["conv3.weight"], problem.model.state_dict()["conv3.weight"])


def test_control_has_the_same_mask_and_other_weights(tmp_path):
    _, one, _, ticket = _run(tmp_path / "a", LotteryTicket(sparsity=0.8, rounds=2))
    problem, two, trials, control = _run(
        tmp_path / "b", LotteryTicket(sparsity=0.8, rounds=2, reinit=True)
    )
    for name, mask in one.host.masks(ticket).items():
        assert torch.equal(mask, two.host.masks(control)[name]), name
    start = two.host.build(trials[-1].candidate.with_training(None)).state_dict()["conv3.weight"]
    initial = problem.model.state_dict()["conv3.weight"]
    assert not (start[start != 0] == initial[start != 0]).any()


def test_what_cant_be_reset_is_refused_before_training():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(ConfigError, match=r"scaled \(Own\) has parameters, and no reset"):
        reinitialised(_with(Own()), 0)


def _with(module: nn.Module) -> nn.Module:
    model = nn.Sequential()
    model.add_module("scaled", module)
    return model


def test_iterative_rounds_remove_as_many_each(tmp_path):
    pruner = Iterative(criterion="l1", sparsity=0.75, rounds=3)
    _, executor, trials, _ = _run(tmp_path, pruner)
    kept = [executor.host.store.get(t.weights).kept["conv3"] for t in trials]
    assert [len(k) for k in kept] == [12, 8, 4]
    assert set(kept[2]) < set(kept[1]) < set(kept[0])


def test_iterative_geometric_removes_the_same_share(tmp_path):
    pruner = Iterative(criterion="l1", sparsity=0.75, rounds=2, schedule="geometric")
    _, executor, trials, _ = _run(tmp_path, pruner)
    assert [len(executor.host.store.get(t.weights).kept["conv3"]) for t in trials] == [8, 4]
