"""NNI's annealing as it is: 16 moves, hardly anything refused, rates by size; and no hang."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raycompress.candidate import Shard, Trial
from raycompress.errors import BudgetError, ConfigError
from raycompress.pruning import NNISimulatedAnnealing
from raycompress.pruning.nni_annealing import _to_sparsity
from raycompress.search import run_search
from raycompress.structure import analyze
from raycompress.targets import config_list
from raycompress.testing import PrunerContract, ToyTask, toy_problem

NNI = NNISimulatedAnnealing()


class TestBudget(PrunerContract):
    pruner = NNI
    budget: ClassVar = {"macs": "40%"}


class TestSparsity(PrunerContract):
    pruner = NNISimulatedAnnealing(sparsity=0.5, start_temperature=30.0)


class Told:
    """Scores from a function of the counts."""

    def __init__(self, score):
        self.score, self.asked = score, []

    def publish(self, ranking):
        pass

    def evaluate(self, candidates, split="validation"):
        self.asked.extend(candidates)
        return [Trial(c, (Shard(1, self.score(c.counts), 0.0),)) for c in candidates]


def _random(counts):
    """An accuracy in [0, 1] that has nothing to do with the model."""
    return random.Random(str(sorted(counts.items()))).random()


def _run(tmp_path, pruner=NNI, score=_random, budget=None, seed=0, width=8):
    task = ToyTask(width)
    problem, _ = toy_problem(str(tmp_path), budget, seed)
    model = task.build_model().eval()
    told, figures = Told(score), []
    problem = replace(
        problem,
        model=model,
        structure=analyze(model, task.example_inputs()),
        executor=told,
        report=figures.append,
    )
    winner = run_search(pruner.search(problem), told)
    return problem, told.asked, figures, winner


def test_it_accepts_95_percent_and_makes_16_moves(tmp_path):
    """100 * 0.9^16 = 18.5 is the first temperature that isn't above 20."""
    moves = proposals = 0
    for seed in range(20):
        _, asked, figures, winner = _run(tmp_path, budget={"params": "50%"}, seed=seed, width=32)
        temperatures = [each["temperature"] for each in figures]
        assert len(set(temperatures)) == 16
        assert sorted(set(temperatures), reverse=True) == pytest.approx(
            [100 * 0.9**k for k in range(16)]
        )
        # The last proposal is accepted, too: that is what ends a temperature.
        moves += int(figures[-1]["accepted"]) + 1
        proposals += len(asked)
        assert _random(winner.counts) == max(_random(candidate.counts) for candidate in asked)
    assert moves == 20 * 16
    assert moves / proposals >= 0.95


def test_even_the_worst_of_a_score_in_0_to_1_is_accepted_with_95_percent():
    rng, draws = random.Random(0), 4000
    share = sum(NNI.takes(1.0, 20.0, rng) for _ in range(draws)) / draws
    expected = math.exp(-1 / 20)
    assert expected > 0.951
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_it_ends_where_nni_hangs_on_large_metrics(tmp_path):
    """Issue 4527: a metric in the thousands; what is worse is never accepted."""
    pruner = replace(NNI, max_rejections=7)
    scores = iter(range(10**6, 0, -1000))
    _, asked, figures, winner = _run(
        tmp_path, pruner, lambda counts: float(next(scores)), {"params": "50%"}
    )
    assert len(asked) == 1 + 15 * 7 and winner == asked[0]
    assert figures[-1]["accepted"] == 1


def test_it_refuses_where_nni_draws_for_ever(tmp_path):
    """Issue 3865: hardly any draw can be scaled to a high sparsity."""
    problem, _ = toy_problem(str(tmp_path))
    with pytest.raises(BudgetError, match=r"none of 50 draws .* scaled to sparsity 0\.9999 "):
        NNISimulatedAnnealing(sparsity=0.9999, max_draws=50).check(problem)


@pytest.mark.parametrize("budget", [{"params": "20%"}, {"macs": "15%"}, {"macs": 20000}])
def test_larger_groups_lose_at_least_as_large_a_share_and_budgets_are_met(tmp_path, budget):
    problem, asked, _, _ = _run(tmp_path, budget=budget, width=32)
    dense = problem.structure.cost()
    assert len(set(asked)) > 5
    for candidate in asked:
        cost = problem.structure.cost(candidate.counts)
        assert problem.budget.excess(cost, dense) <= 1
        # conv1's group: conv1 (2*9*32) and conv2 (32*9*32) weights; conv3: 64*9*32.
        small, large = candidate.counts.get("conv1", 32) / 32, candidate.counts["conv3"] / 64
        assert small >= large - 1 / 32


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=1, max_size=6))
def test_scaling_by_hand(pairs):
    sizes = sorted(size for size, _ in pairs)
    rates = sorted(rate for _, rate in pairs)
    scaled = _to_sparsity(0.5, sizes, rates)
    removed = sum(int(size * rate) for size, rate in zip(sizes, rates, strict=True))
    if removed == 0 or rates[-1] * 0.5 * sum(sizes) / removed >= 1:
        assert scaled is None
    else:
        assert scaled == pytest.approx([r * 0.5 * sum(sizes) / removed for r in rates])
        assert 0 <= scaled[0] <= scaled[-1] < 1


def test_scaling_of_one_case():
    # 10 * 0.2 + 30 * 0.4 = 14 of 40 weights: times 0.5 / 0.35.
    assert _to_sparsity(0.5, [10, 30], [0.2, 0.4]) == pytest.approx([0.2 / 0.7, 0.4 / 0.7])
    assert _to_sparsity(0.9, [10, 30], [0.0, 1.0]) is None


def test_candidates_are_judged_as_they_are(tmp_path):
    _, asked, _, _ = _run(tmp_path, budget={"macs": "50%"})
    assert all(c.recalibrate == 0 and c.reconstruct is None and c.kept for c in asked)


def test_what_it_needs(tmp_path):
    problem, _ = toy_problem(str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs a budget, such as .*, or a sparsity"):
        NNI.check(problem)
    targets = config_list([{"op_names": ["conv3"], "sparsity": 0.5}])
    with pytest.raises(ConfigError, match=r"'conv3' a sparsity, which NNISimulatedAnnealing is"):
        NNI.check(replace(problem, targets=targets))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sparsity": 1.0}, r"NNISimulatedAnnealing\.sparsity must be in \[0, 1\), got 1"),
        ({"stop_temperature": 100}, r"stop_temperature < start_temperature must hold, got 100"),
        ({"cool_down_rate": 1.0}, r"cool_down_rate must be in \(0, 1\), got 1"),
        ({"max_draws": 0}, r"max_draws must be at least 1, got 0"),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        NNISimulatedAnnealing(**keys)
