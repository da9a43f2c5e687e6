"""One-shot pruning of channels: exact counts, a global threshold, budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raycompress.criteria import Criterion
from raycompress.errors import ConfigError
from raycompress.pruning import L1Filter, L2Filter, OneShot
from raycompress.pruning.allocation import below_budget, globally, order_of_removal
from raycompress.search import run_search
from raycompress.structure import ChannelGroup
from raycompress.targets import Target
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


def _groups(sizes: dict[str, int], min_kept: int = 1, multiple: int = 1) -> dict[str, ChannelGroup]:
    return {
        name: ChannelGroup(name, size, (), (), (), min_kept=min_kept, multiple=multiple)
        for name, size in sizes.items()
    }


def test_one_threshold_over_all_groups():
    scores = {"a": torch.tensor([5.0, 1.0, 3.0]), "b": torch.tensor([2.0, 2.0, 9.0, 1.0])}
    order = order_of_removal(scores, ["a", "b"])
    assert order == ["a", "b", "b", "b", "a", "a", "b"]  # 1, 1, 2, 2, 3, 5, 9
    groups = _groups({"a": 3, "b": 4})
    assert globally(order, groups, 4) == {"a": 2, "b": 1}
    # b is at its fewest: the next go from a, and the number removed is exact.
    assert globally(order, groups, 5) == {"a": 1, "b": 1}
    assert globally(order, groups, 99) == {"a": 1, "b": 1}
    assert globally(order, groups, 4, min_kept=2) == {"a": 2, "b": 2}
    assert globally(order, groups, 4, round_to=2) == {"a": 2, "b": 2}


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 12), min_size=1),
    st.floats(0, 0.99),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_global_counts_are_exact_and_nested(sizes, sparsity, min_kept, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few values: ties everywhere.
    scores = {n: torch.randint(3, (s,), generator=generator) for n, s in sizes.items()}
    order = order_of_removal(scores, list(sizes))
    groups = _groups(sizes)
    total = sum(sizes.values())
    removed = math.floor(total * sparsity)
    counts = globally(order, groups, removed, min_kept=min_kept)
    most = sum(max(0, s - min_kept) for s in sizes.values())
    assert total - sum(counts.values()) == min(removed, most)
    assert all(counts[n] >= min(min_kept, sizes[n]) for n in sizes)
    fewer = globally(order, groups, removed + 1, min_kept=min_kept)
    assert all(fewer[n] <= counts[n] for n in sizes)


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
    ],
)
def test_contradictions_are_refused_before_anything_runs(tmp_path, pruner, targets, message):
    problem, _ = toy_problem(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        pruner.check(replace(problem, targets=targets))


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
