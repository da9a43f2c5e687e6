"""What `Pruner.prune` says of arguments that can't work, before anything runs."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import raycompress
from raycompress.errors import ConfigError, TaskError
from raycompress.pruning import Iterative, L1Filter, Level
from raycompress.testing import ToyNet, ToyTask

TASK = ToyTask()


class Iterable(ToyTask):
    def dataset(self, split):
        return iter(super().dataset(split))


class OneScore(ToyTask):
    def score(self, outputs, batch):
        return super().score(outputs, batch).mean()


class ManyLosses(ToyTask):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch).repeat(2)


class TestArguments:
    cases: ClassVar = [
        ({"task": ToyTask}, TaskError, "task must be an instance of raycompress.Task, got <class"),
        ({"task": Iterable()}, TaskError, "Iterable.example_inputs failed: TypeError"),
        ({"device": "gpu"}, ConfigError, "device 'gpu' can't be used here"),
        ({"model": ToyNet(5)}, TaskError, r"'conv1.weight' has shape \(8, 2, 3, 3\) in the task's"),
        ({"budget": "50%"}, ConfigError, "budget must be a mapping"),
        (
            {"targets": [{"op_names": ["conv1"], "start_epoch": 1}]},
            ConfigError,
            "targets.start_epoch is nothing that L1Filter can honour; allowed: sparsity, final",
        ),
    ]

    @pytest.mark.parametrize(("arguments", "error", "message"), cases)
    def test_mistakes(self, arguments, error, message):
        given = {"model": TASK.build_model(), "task": TASK, **arguments}
        with pytest.raises(error, match=message):
            L1Filter(sparsity=0.5).prune(**given)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (OneScore(), r"OneScore.score must return one number for each example, got shape \(\)"),
        (ManyLosses(), r"ManyLosses.loss must return a scalar tensor, got shape \(2,\)"),
    ],
)
def test_a_task_that_breaks_its_contract_is_named(task, message):
    with pytest.raises(raycompress.RaycompressError, match=message):
        Iterative(sparsity=0.5, rounds=1, epochs=0.1).prune(task.build_model(), task)


def test_single_weights_save_no_multiply_adds():
    with pytest.raises(ConfigError, match=r"can't be macs 50%, which takes a pruner or criterion"):
        Level().prune(TASK.build_model(), TASK, budget={"macs": "50%"})


def test_config_list_as_it_is():
    entries = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv1"], "exclude": True}]
    model = TASK.build_model()
    masks = L1Filter().prune(model, TASK, entries)
    again = L1Filter().prune(model, TASK, raycompress.config_list(entries))
    assert int(masks["conv3.weight"].flatten(1).any(1).sum()) == 8 and "conv1.weight" not in masks
    assert all(torch.equal(masks[name], again[name]) for name in masks | again)
