"""One-shot pruning of channels: exact counts, a global threshold, budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raycompress.criteria import Criterion
from raycompress.errors import ConfigError
from raycompress.pruning import L1Filter, L2Filter, OneShot
from raycompress.pruning.allocation import Competition, below_budget
from raycompress.search import run_search
from raycompress.targets import Target, config_list
from raycompress.testing import PrunerContract, ToyTask, toy_problem


class TestL1Filter(PrunerContract):
    pruner = L1Filter(sparsity=0.5)


class TestL2FilterWithin(PrunerContract):
    pruner = L2Filter()
    budget: ClassVar = {"macs": "40%"}


class TestGlobal(PrunerContract):
    pruner = L1Filter(scope="global", sparsity=0.6, min_kept=2)


class TestGlobalWithin(PrunerContract):
    pruner = OneShot(criterion="l2", scope="global", round_to=2)
    budget: ClassVar = {"params": "50%"}


@dataclass(frozen=True, kw_only=True)
class LastGoFirst(Criterion):
    """A criterion of one's own: the higher its index, the sooner a channel goes."""

    def score(self, weight: Tensor) -> Tensor:
        return -torch.arange(len(weight)).double()


class TestOwnCriterion(PrunerContract):
    pruner = OneShot(criterion="test_one_shot:LastGoFirst", sparsity=0.5)


def test_own_criterion_decides():
    task = ToyTask()
    masks = TestOwnCriterion.pruner.prune(task.build_model(), task)
    rows = masks["conv3.weight"].flatten(1).any(dim=1)
    assert rows.tolist() == [True] * 8 + [False] * 8


def test_one_threshold_over_all_groups():
    scores = {"a": torch.tensor([5.0, 1.0, 3.0]), "b": torch.tensor([2.0, 2.0, 9.0, 1.0])}
    contest = Competition(scores, {"a": 1, "b": 1})
    # In order: 1 (a), 1 (b), 2 (b), 2 (b), 3 (a); 5 and 9 are the last of theirs.
    assert contest.counts(4) == {"a": 2, "b": 1}
    assert contest.counts(1) == {"a": 2, "b": 4}
    assert contest.counts(99) == {"a": 1, "b": 1} and contest.most == 5
    # With two of each safe, the next in the order goes instead.
    assert Competition(scores, {"a": 2, "b": 2}).counts(99) == {"a": 2, "b": 2}
    assert scores["a"].tolist() == [5.0, 1.0, 3.0]


@settings(deadline=None)  # the first call warms up
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(0, 30),
    st.integers(1, 3),
)
def test_competition_against_brute_force(layers, removed, least):
    scores = {str(i): torch.tensor(values) for i, values in enumerate(layers)}
    counts = Competition(scores, dict.fromkeys(scores, least)).counts(removed)
    total = sum(map(len, layers))
    most = sum(max(0, len(values) - least) for values in layers)
    assert total - sum(counts.values()) == min(removed, most)
    # One unit at a time, the lowest first, never a layer's last ones.
    left = {name: sorted(values.tolist()) for name, values in scores.items()}
    for _ in range(total - sum(counts.values())):
        name = min((n for n in left if len(left[n]) > least), key=lambda n: (left[n][0], n))
        left[name].pop(0)
    assert {name: len(values) for name, values in left.items()} == counts


def test_entries_that_compete(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    targets = config_list(
        [
            {"op_names": ["conv1", "conv3"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.6},
        ]
    )
    pruner = OneShot(criterion="test_one_shot:Raw")
    with torch.no_grad():
        problem.model.get_parameter("conv1.weight").mul_(1e-3)  # all of the group would go
        problem.model.get_parameter("conv2.weight").mul_(1e-3)
    winner = run_search(pruner.search(replace(problem, targets=targets)), executor)
    # 12 of 24 go: at most floor(0.6 * 8) = 4 of the first, so 8 of the other.
    assert winner.counts == {"conv1": 4, "conv3": 8}


@given(st.integers(0, 50), st.integers(0, 50))
def test_bisection_finds_the_fewest_removed(most, enough):
    enough = min(enough, most)

    def counts(removed: int) -> dict[str, int]:
        return {"a": removed}

    assert below_budget(counts, most, lambda c: c["a"] >= enough) == {"a": enough}


def test_global_scope_spares_the_group_that_matters(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    with torch.no_grad():
        problem.model.get_parameter("conv3.weight")[:8] *= 100
    pruner = OneShot(criterion="test_one_shot:Raw", scope="global", sparsity=0.4)
    winner = run_search(pruner.search(problem), executor)
    total = sum(g.num_channels for g in problem.structure.groups)
    kept = {g.name: winner.counts.get(g.name, g.num_channels) for g in problem.structure.groups}
    assert sum(kept.values()) == total - math.floor(0.4 * total)
    assert kept["conv3"] >= 8


@dataclass(frozen=True, kw_only=True)
class Raw(Criterion):
    normalised = False

    def score(self, weight: Tensor) -> Tensor:
        return weight.abs().sum(dim=1)


@pytest.mark.parametrize(
    ("pruner", "targets", "message"),
    [
        (L1Filter(scope="global"), (), "L1Filter needs a sparsity"),
        (
            L1Filter(scope="global", sparsity=0.5),
            (Target(op_names=("conv3",), sparsity=0.2),),
            "a sparsity of its own",
        ),
        (L1Filter(), (), "L1Filter needs a sparsity for"),
        (
            L1Filter(sparsity=0.5),
            (Target(op_types=("Conv2d",), frequency=2),),
            "targets.frequency is nothing that L1Filter can honour",
        ),
        (
            L1Filter(),
            (
                Target(op_names=("conv1",), total_sparsity=0.5, global_group_id="x"),
                Target(op_names=("conv3",), total_sparsity=0.3, global_group_id="x"),
            ),
            "global_group_id x ask for total sparsities 0.5 and 0.3",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_runs(tmp_path, pruner, targets, message):
    problem, _ = toy_problem(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        pruner.check(replace(problem, targets=targets))


def test_scores_of_coupled_layers_combine_as_asked(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    with torch.no_grad():  # the block's layers disagree
        for i in range(8):
            problem.model.get_parameter("conv1.weight")[i] = 8.0 - i
            problem.model.get_parameter("conv2.weight")[i] = {3: 100 / 72, 7: 30.0}.get(i, 1.0)
    kept = {}
    for how in ("sum", "mean", "max"):
        pruner = OneShot(criterion="test_one_shot:Raw", combine=how, sparsity=0.5)
        winner = run_search(pruner.search(problem), executor)
        kept[how] = executor.host.kept(winner)["conv1"].tolist()
    # conv1 has 18 weights a filter, conv2 has 72. Of 2: 108 and 72; of 3: 90 and 100.
    assert kept["sum"] == kept["mean"] == [0, 1, 3, 7]
    assert kept["max"] == [0, 1, 2, 7]
    with pytest.raises(ConfigError, match="combine must be 'sum', 'mean' or 'max', got 'min'"):
        OneShot(combine="min")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"criterion": "l3"}, "no criterion 'l3'; allowed: l1, l2, "),
        ({"criterion": "level"}, "'level' scores weights, and channels are pruned"),
        ({"scope": "all"}, "OneShot.scope must be 'group' or 'global', got 'all'"),
        ({"sparsity": 1.0}, r"OneShot.sparsity must be in \[0, 1\), got 1"),
        (
            {"criterion": "test_one_shot:TestL1Filter"},
            "must be a subclass of raycompress.Criterion",
        ),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        OneShot(**keys)
