"""Soft filters: zeroed between intervals, free to grow back, removed at the end."""

from __future__ import annotations

from typing import ClassVar

import torch

from raycompress.candidate import Training
from raycompress.criteria import L2
from raycompress.pruning import SoftFilter
from raycompress.pruning.soft import zeroed
from raycompress.search import run_search
from raycompress.testing import PrunerContract, toy_problem


class TestSoftFilter(PrunerContract):
    pruner = SoftFilter(criterion="l2", sparsity=0.5, intervals=2)


class TestSoftFilterWithin(PrunerContract):
    pruner = SoftFilter(criterion="l1", intervals=2)
    budget: ClassVar = {"macs": "40%"}
    gradual = True


def test_only_the_filters_are_zeroed(tmp_path):
    problem, _ = toy_problem(str(tmp_path))
    state = problem.model.state_dict()
    cut = zeroed(state, problem.structure, {"conv3": torch.tensor([0, 5])})
    rows = cut["conv3.weight"].flatten(1).abs().sum(1)
    assert rows.nonzero().flatten().tolist() == [0, 5]
    assert cut["conv3.bias"].nonzero().flatten().tolist() == [0, 5]
    for name in ("bn3.weight", "fc.weight", "conv1.weight"):
        assert torch.equal(cut[name], state[name])
    assert torch.equal(state["conv3.weight"], problem.model.state_dict()["conv3.weight"])


def test_filters_grow_back_and_go_at_the_end(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    trials = []
    pruner = SoftFilter(criterion="l2", sparsity=0.5, intervals=3)
    winner = run_search(pruner.search(problem), executor, lambda _, step: trials.extend(step))
    assert [t.candidate.training for t in trials] == [
        Training(1.0, None, 1000 * n) for n in (1, 2, 3)
    ]
    started = executor.host.store.get(trials[1].candidate.weights).state
    dead = started["conv3.weight"].flatten(1).abs().sum(1) == 0
    assert int(dead.sum()) == 8
    after = executor.host.store.get(trials[1].weights).state
    # A zero filter emits its norm's shift; where that is positive, gradients come through ReLU.
    shifted = dead & (started["bn3.bias"] > 0)
    assert shifted.any() and (after["conv3.weight"][shifted].flatten(1).abs().sum(1) > 0).all()
    # At the end those go that score lowest on the last weights.
    last = problem.dense(trials[-1].weights)
    scores = L2().scores(last, problem.structure, ["conv3"], {})["conv3"]
    kept = executor.host.kept(winner)["conv3"]
    gone = [i for i in range(16) if i not in kept.tolist()]
    assert len(gone) == 8 and scores[kept].min() >= scores[gone].max()
