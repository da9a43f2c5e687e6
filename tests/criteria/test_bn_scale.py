"""Scale factors of norms, and the global threshold of Network Slimming."""

from __future__ import annotations

import pytest
import torch
from conftest import Given, probe_of, scores_of
from torch import nn

from raycompress.criteria import BNScale
from raycompress.errors import ConfigError
from raycompress.pruning import OneShot, Slim
from raycompress.search import run_search
from raycompress.targets import Target
from raycompress.testing import ToyTask, toy_problem


def set_gammas(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("bn1.weight").copy_(torch.arange(1.0, 9.0))
        model.get_parameter("bn2.weight").copy_(-3 * torch.arange(1.0, 9.0))
        model.get_parameter("bn3.weight").copy_(torch.arange(16.0, 0.0, -1.0))


def test_by_hand_the_mean_of_absolute_factors(tmp_path):
    problem, _ = toy_problem(str(tmp_path))
    set_gammas(problem.model)
    scores = BNScale().scores(problem.model, problem.structure, ["conv1", "conv3"], {})
    assert scores["conv1"].tolist() == [2.0 * i for i in range(1, 9)]  # (i + 3 i) / 2
    assert scores["conv3"].tolist() == [float(i) for i in range(16, 0, -1)]


def test_one_threshold_over_the_model(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    set_gammas(problem.model)
    winner = run_search(Slim(sparsity=0.5).search(problem), executor)
    # The 12 smallest of 2, 4, ..., 16 and 1, 2, ..., 16: 1 to 8 of conv3, and 2, 4, 6, 8 of conv1.
    assert winner.counts == {"conv1": 4, "conv3": 8}
    # Ten times larger factors in one layer: all the others' channels are now below the threshold.
    with torch.no_grad():
        problem.model.get_parameter("bn3.weight").mul_(10)
    winner = run_search(Slim(sparsity=0.5).search(problem), executor)
    assert winner.counts == {"conv1": 1, "conv3": 11}  # no group is emptied


class Partly(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 2),
        )


class PartlyTask(ToyTask):
    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return Partly()

    def example_inputs(self) -> tuple[torch.Tensor]:
        return (torch.zeros(2, 1, 6, 6),)


def test_groups_without_norms_stay_whole():
    task = PartlyTask()
    masks = Slim(sparsity=0.5).prune(task.build_model(), task)
    assert masks["0.weight"].flatten(1).any(dim=1).sum() == 3  # half of the 6 that compete
    assert masks["3.weight"].flatten(1).any(dim=1).all()
    only = [Target(op_names=("3",))]
    with pytest.raises(ConfigError, match="targets select no channel group"):
        Slim(sparsity=0.5).prune(task.build_model(), task, only)


def test_no_norm_is_an_error_that_names_the_group():
    task = PartlyTask()
    with pytest.raises(ConfigError, match="group '3' has no norm with scale factors"):
        OneShot(criterion="bn_scale", sparsity=0.5).prune(task.build_model(), task)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())
    given = Given(plain, torch.zeros(2, 1, 6, 6), torch.zeros(2, dtype=torch.long), 2)
    with pytest.raises(ConfigError, match="no channel group of this model has a norm"):
        Slim(sparsity=0.5).prune(plain, given)


def test_other_norms_have_factors_too(randomised):
    model = randomised(
        nn.Sequential(nn.Conv1d(2, 6, 1), nn.GroupNorm(6, 6), nn.ReLU(), nn.Conv1d(6, 3, 1))
    )
    given = Given(model, torch.randn(2, 2, 5), torch.zeros(2, dtype=torch.long), 2)
    found = scores_of(BNScale(), probe_of(given))["0"]
    torch.testing.assert_close(found, model[1].weight.detach().abs().double())
