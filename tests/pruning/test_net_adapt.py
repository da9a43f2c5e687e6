"""NetAdapt: targets by hand, proposals against brute force, the declared rule."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raycompress.candidate import Shard, Trial
from raycompress.errors import BudgetError, ConfigError
from raycompress.pruning import NetAdapt
from raycompress.pruning.pruner import allocator
from raycompress.search import run_search
from raycompress.testing import PrunerContract, toy_problem


class TestMacs(PrunerContract):
    pruner = NetAdapt(iterations=2, epochs=0.5)
    budget: ClassVar = {"macs": "60%"}
    gradual = True


class TestParams(PrunerContract):
    pruner = NetAdapt(iterations=2, epochs=0.5, rule="ratio", round_to=2, min_kept=2)
    budget: ClassVar = {"params": "50%"}
    gradual = True


def test_targets_by_hand():
    # From twice the budget in three steps of 1/1.75, 0.5/1.75 and 0.25/1.75.
    found = NetAdapt(iterations=3, decay=0.5).targets_from(2.0)
    assert found == pytest.approx([2 - 1 / 1.75, 2 - 1.5 / 1.75, 1.0])


@given(st.floats(1, 50), st.integers(1, 40), st.floats(0.1, 1))
def test_targets_fall_and_end_at_the_budget(excess, iterations, decay):
    found = NetAdapt(iterations=iterations, decay=decay).targets_from(excess)
    assert len(found) == iterations and found[-1] == 1
    assert all(a >= b - 1e-9 for a, b in zip([excess, *found], found, strict=False))


class Told:
    """Answers candidates from a function of their counts; every training is a copy."""

    def __init__(self, score) -> None:
        self.score = score
        self.asked = []

    def publish(self, ranking) -> None:
        pass

    def evaluate(self, candidates, split="validation"):
        self.asked.append(candidates)
        return [
            Trial(c, (Shard(1, self.score(c.counts), 0.0),), weights=c.weights) for c in candidates
        ]


def _run(tmp_path, pruner, budget, score):
    problem, _ = toy_problem(str(tmp_path), budget)
    told = Told(score)
    problem = replace(problem, executor=told)
    return problem, told, run_search(pruner.search(problem), told)


def test_each_group_proposes_the_fewest_that_meet_the_target(tmp_path):
    pruner = NetAdapt(iterations=3)
    problem, told, winner = _run(
        tmp_path, pruner, {"macs": "60%"}, lambda counts: counts.get("conv3", 16)
    )
    fitter = allocator(problem, list(problem.groups()), "NetAdapt", 1, 1)
    sizes = {g.name: g.num_channels for g in fitter.groups}
    counts, targets = dict(sizes), pruner.targets_from(fitter.excess(sizes))
    for target, candidates in zip(targets, told.asked, strict=True):
        for candidate in candidates:
            proposed = {**sizes, **candidate.counts}
            (changed,) = [n for n in sizes if proposed[n] != counts[n]]
            assert fitter.excess(proposed) <= target
            one_more = {**proposed, changed: proposed[changed] + 1}
            assert fitter.excess(one_more) > target
        # The rule: the best score, which is that of conv3's width here.
        best = max(candidates, key=lambda c: c.counts.get("conv3", 16))
        counts = {**sizes, **best.counts}
    assert {**sizes, **winner.counts} == counts and counts["conv3"] == 16


def test_ratio_weighs_what_is_lost_by_what_is_saved(tmp_path):
    # conv1 saves more than it must for the same loss of score.
    def score(counts):
        return -1.0 if counts else 0.0

    _, told, _ = _run(tmp_path, NetAdapt(iterations=2, rule="ratio"), {"macs": "60%"}, score)
    assert len(told.asked) == 2


def test_what_one_group_cant_do_alone_takes_several(tmp_path):
    pruner = NetAdapt(iterations=1)
    problem, told, winner = _run(tmp_path, pruner, {"macs": "4%"}, lambda counts: 0.0)
    assert len(told.asked) > 1
    cost = problem.structure.cost(winner.counts)
    assert problem.budget.excess(cost, problem.structure.cost()) <= 1


def test_infeasible_is_refused_before_any_training(tmp_path):
    problem, _ = toy_problem(str(tmp_path), {"macs": "0.1%"})
    with pytest.raises(BudgetError, match="can't be reached"):
        NetAdapt().check(problem)
    with pytest.raises(ConfigError, match="NetAdapt needs a budget"):
        NetAdapt().check(replace(problem, budget=None))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"iterations": 0}, r"NetAdapt\.iterations must be at least 1, got 0"),
        ({"decay": 0}, r"NetAdapt\.decay must be in \(0, 1\], got 0"),
        ({"epochs": 0}, r"NetAdapt\.epochs must be above 0, got 0"),
        ({"rule": "best"}, r"NetAdapt\.rule must be 'score' or 'ratio', got 'best'"),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        NetAdapt(**keys)
