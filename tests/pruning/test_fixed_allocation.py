"""Given sparsities: counts by hand, budgets met by every choice."""

from __future__ import annotations

import random
from typing import ClassVar

import pytest

from raycompress.errors import ConfigError
from raycompress.pruning import FixedAllocation
from raycompress.pruning.pruner import allocator
from raycompress.search import run_search
from raycompress.testing import PrunerContract, toy_problem

GROUPS = {"conv1": 8, "conv3": 16}  # conv1 and conv2 are added, and go together


class TestFixedAllocation(PrunerContract):
    pruner = FixedAllocation(sparsities={"conv1": 0.3, "*": 0.5})


class TestFixedAllocationWithin(PrunerContract):
    pruner = FixedAllocation(
        sparsities={"conv*": 0.5}, criterion="taylor", reconstruct=True, recalibrate=1
    )
    budget: ClassVar = {"macs": "40%"}


def counts(pruner: FixedAllocation, folder: str, budget=None) -> dict[str, int]:
    problem, executor = toy_problem(folder, budget)
    found = run_search(pruner.search(problem), executor)
    return {**GROUPS, **found.counts}


@pytest.mark.parametrize(
    ("sparsities", "expected"),
    [
        ({"conv1": 0.3, "conv3": 0.5}, {"conv1": 6, "conv3": 8}),  # floor(2.4) = 2 of 8 go
        ({"conv2": 0.5}, {"conv1": 4, "conv3": 16}),  # by any layer of the group
        ({"conv?": 0.25, "*3": 0.9}, {"conv1": 6, "conv3": 12}),  # the first that matches
        ({"conv3": 0.99}, {"conv1": 8, "conv3": 1}),
        ({}, GROUPS),
    ],
)
def test_counts_by_hand(sparsities, expected, tmp_path):
    assert counts(FixedAllocation(sparsities=sparsities), str(tmp_path)) == expected


def test_any_choice_meets_the_budget_in_its_own_direction(tmp_path):
    rng = random.Random(0)
    problem, executor = toy_problem(str(tmp_path), {"params": "50%"})
    fit = allocator(problem, list(GROUPS), "test", 1, 1)
    seen = set()
    for _ in range(20):
        sparsities = {name: rng.uniform(0, 0.99) for name in GROUPS}
        winner = run_search(FixedAllocation(sparsities=sparsities).search(problem), executor)
        kept = {**GROUPS, **winner.counts}
        assert fit.meets(kept)
        assert kept == fit.fit({name: 1 - s for name, s in sparsities.items()})
        seen.add(tuple(kept.values()))
        larger = [{**kept, name: kept[name] + 1} for name in GROUPS if kept[name] < GROUPS[name]]
        assert larger and not any(fit.meets(each) for each in larger)
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsities": {"a": 1.0}}, r"FixedAllocation.sparsities: 'a' must be in \[0, 1\), got 1"),
        ({"sparsities": {"a": float("nan")}}, "got nan"),
        ({"criterion": "level"}, "FixedAllocation.criterion"),
        ({"recalibrate": -1}, "FixedAllocation.recalibrate must be at least 0, got -1"),
        ({"round_to": 0}, "FixedAllocation.round_to"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FixedAllocation(**settings)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'covn1' matches no layer .* did you mean .*conv1"):
        counts(FixedAllocation(sparsities={"covn1": 0.5}), str(tmp_path))
