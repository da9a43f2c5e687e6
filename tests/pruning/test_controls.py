"""Controls, and Network Slimming with its training."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from raycompress.criteria import Random
from raycompress.errors import ConfigError
from raycompress.pruning import FromScratch, RandomFilter, Slim
from raycompress.search import run_search
from raycompress.testing import PrunerContract, toy_problem
from raycompress.training import ScaleSparsity


class TestRandomFilter(PrunerContract):
    pruner = RandomFilter(sparsity=0.5)


class TestFromScratch(PrunerContract):
    pruner = FromScratch(epochs=2)
    budget: ClassVar = {"macs": "50%"}


class TestSlimTrains(PrunerContract):
    pruner = Slim(sparsity=0.4, epochs=2, penalty=0.01)


def test_draws_differ_by_seed_and_not_by_what_else_is_ranked(tmp_path):
    problem, _ = toy_problem(str(tmp_path))
    names = ["conv1", "conv3"]
    both = Random(seed=1).scores(problem.model, problem.structure, names, {})
    alone = Random(seed=1).scores(problem.model, problem.structure, ["conv3"], {})
    other = Random(seed=2).scores(problem.model, problem.structure, ["conv3"], {})
    assert torch.equal(both["conv3"], alone["conv3"])
    assert not torch.equal(other["conv3"], alone["conv3"])


def test_scratch_has_nothing_of_the_trained_model(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    trials = []
    pruner = FromScratch(sparsity=0.5, epochs=1)
    winner = run_search(pruner.search(problem), executor, lambda _, step: trials.extend(step))
    (trial,) = trials
    start = executor.host.build(trial.candidate.with_training(None))
    kept = executor.host.kept(winner)["conv1"]
    dense = problem.model.get_parameter("conv1.weight")[kept]
    assert not (start.get_parameter("conv1.weight") == dense).any()
    assert winner.weights == trial.weights


def test_slim_prunes_what_its_training_shrank(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    trials = []
    pruner = Slim(sparsity=0.5, epochs=3, penalty=0.05)
    winner = run_search(pruner.search(problem), executor, lambda _, step: trials.extend(step))
    assert trials[0].candidate.training.methods == (ScaleSparsity(strength=0.05),)
    assert winner.weights == trials[0].weights
    state = executor.host.store.get(winner.weights).state
    kept = executor.host.kept(winner)["conv3"]
    scales = state["bn3.weight"].abs()
    gone = torch.ones(16, dtype=torch.bool)
    gone[kept] = False
    if gone.any():
        assert scales[kept].min() >= scales[gone].max()


def test_bad_fields():
    with pytest.raises(ConfigError, match=r"Slim\.penalty must be above 0, got 0"):
        Slim(penalty=0)
    with pytest.raises(ConfigError, match=r"FromScratch\.epochs must be above 0, got 0"):
        FromScratch(epochs=0)
