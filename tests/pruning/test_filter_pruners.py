"""One-shot pruners by redundancy, activations, gradients and norm scales; searches over them."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from raycompress.analysis import Sensitivity
from raycompress.criteria import CRITERIA
from raycompress.pruning import (
    FPGM,
    ActivationAPoZRank,
    ActivationMeanRank,
    SimulatedAnnealing,
    Slim,
    TaylorFO,
)
from raycompress.search import run_search
from raycompress.testing import PrunerContract, ToyTask, toy_problem

CHANNELS = [name for name, criterion in CRITERIA.items() if criterion.kind == "channels"]


class TestFPGM(PrunerContract):
    pruner = FPGM(sparsity=0.5)


class TestFPGMWithin(PrunerContract):
    pruner = FPGM(round_to=2)
    budget: ClassVar = {"macs": "40%"}


class TestActivationAPoZRank(PrunerContract):
    pruner = ActivationAPoZRank(sparsity=0.4, batches=1)


class TestActivationMeanRankWithin(PrunerContract):
    pruner = ActivationMeanRank(scope="global")
    budget: ClassVar = {"params": "50%"}


class TestTaylorFO(PrunerContract):
    pruner = TaylorFO(sparsity=0.5, scope="global", batch_size=16)


class TestTaylorFOWithin(PrunerContract):
    pruner = TaylorFO(form="weight")
    budget: ClassVar = {"macs": "60%"}


class TestSlim(PrunerContract):
    pruner = Slim(sparsity=0.5)


class TestSlimWithin(PrunerContract):
    pruner = Slim()
    budget: ClassVar = {"macs": "50%"}


@pytest.mark.parametrize("name", CHANNELS)
def test_annealing_and_sensitivity_take_every_criterion(tmp_path, name):
    problem, executor = toy_problem(str(tmp_path), {"macs": "50%"})
    # Away from where all norms are alike.
    with torch.no_grad():
        for each in ("bn1", "bn2", "bn3"):
            norm = problem.model.get_submodule(each)
            norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    search = SimulatedAnnealing(criterion=name, iterations=1, neighbours=2).search(problem)
    winner = run_search(search, executor)
    assert (
        problem.budget.excess(problem.structure.cost(winner.counts), problem.structure.cost()) <= 1
    )
    rows = Sensitivity(criterion=name, sparsities=(0.5,)).run(problem, executor, 0.5)
    assert [(row.group, row.kept) for row in rows] == [("conv1", 4), ("conv3", 8)]


def test_a_channel_that_does_nothing_goes_first():
    """Its norm's output is 0 on all data; what comes in isn't."""
    task = ToyTask()
    for pruner in (
        ActivationAPoZRank(sparsity=1 / 16),
        ActivationMeanRank(sparsity=1 / 16),
        TaylorFO(sparsity=1 / 16),
        Slim(sparsity=1 / 16, scope="group"),
    ):
        model = task.build_model()
        with torch.no_grad():
            model.bn3.weight[11], model.bn3.bias[11] = 0, 0
        masks = pruner.prune(model, task)
        gone = ~masks["conv3.weight"].flatten(1).any(dim=1)
        assert gone.nonzero().flatten().tolist() == [11], pruner
