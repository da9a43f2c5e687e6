"""The curve solver: its curves, its solution against brute force, its search."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

import raycompress
from raycompress.budget import Allocator, Budget
from raycompress.candidate import Ranking, Trial
from raycompress.errors import BudgetError, ConfigError, EvaluationError
from raycompress.ledger import read_ledger
from raycompress.pruning import CurveSolver
from raycompress.pruning.curves import Curves, errors_of, falling
from raycompress.search import Probes, Race, run_search
from raycompress.structure import analyze
from raycompress.testing import PrunerContract, ToyNet, toy_problem


class TestContract(PrunerContract):
    pruner = CurveSolver(iterations=2, neighbours=2, probes=(0.5, 0.2))
    budget: ClassVar = {"macs": "50%"}


class TestContractOfEstimatesAlone(PrunerContract):
    pruner = CurveSolver(iterations=0, probes=())
    budget: ClassVar = {"macs": "50%"}


class TestContractWithoutData(PrunerContract):
    pruner = CurveSolver(iterations=0, reconstruct=False, recalibrate=1, criterion="taylor")
    budget: ClassVar = {"params": "30%"}


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_falling_is_isotonic_regression(values):
    fitted = IsotonicRegression(increasing=False).fit_transform(range(len(values)), values)
    assert falling(values) == pytest.approx(fitted, abs=1e-9)


def _curves(widths, losses, errors=None):
    """Of groups by name; estimates are the squares of the share that has gone."""
    errors = errors or {
        name: (1 - np.arange(each[-1] + 1) / each[-1]) ** 2 for name, each in widths.items()
    }
    return Curves(Ranking("channels", {}), errors, widths, losses)


def test_a_curve_is_a_power_of_the_estimates_through_the_probes():
    errors = {"g": np.array([8.0, 4.0, 2.0, 1.0, 0.0])}
    curves = _curves({"g": (1, 3, 4)}, {"g": (16.0, 1.0, 0.0)}, errors)
    # 16 at an error of 4 and 1 at 1: loss is the square of the error, between and beyond.
    assert curves.at("g", range(5)).tolist() == pytest.approx([64.0, 16.0, 4.0, 1.0, 0.0])


def test_one_probe_gives_the_factor_of_a_group_and_none_the_median_of_all():
    errors = {name: np.array([4.0, 2.0, 1.0, 0.0]) for name in "abc"}
    widths = {"a": (1, 3), "b": (2, 3), "c": (3,)}
    losses = {"a": (6.0, 0.0), "b": (5.0, 0.0), "c": (0.0,)}
    curves = _curves(widths, losses, errors)
    assert curves.at("a", range(4)).tolist() == pytest.approx([12.0, 6.0, 3.0, 0.0])
    assert curves.at("b", range(4)).tolist() == pytest.approx([20.0, 10.0, 5.0, 0.0])
    assert curves.at("c", range(4)).tolist() == pytest.approx([16.0, 8.0, 4.0, 0.0])


def test_without_probes_the_estimates_are_the_losses():
    curves = _curves({"a": (3,)}, {"a": (0.0,)}, {"a": np.array([4.0, 2.0, 1.0, 0.0])})
    assert curves.at("a", [3, 0, 2]).tolist() == [0.0, 4.0, 1.0]


def test_probes_that_lost_the_same_or_nothing_leave_a_rising_curve():
    errors = {"g": np.array([8.0, 4.0, 2.0, 1.0, 0.0]), "h": np.array([2.0, 1.0, 0.0])}
    widths = {"g": (1, 3, 4), "h": (1, 2)}
    same = _curves(widths, {"g": (1.0, 1.0, 0.0), "h": (1.0, 0.0)}, errors).at("g", range(5))
    assert same[0] == pytest.approx(2**0.5) and same[1] == pytest.approx(1.0)
    nothing = _curves(widths, {"g": (0.0, 0.0, 0.0), "h": (1.0, 0.0)}, errors).at("g", range(5))
    assert (np.diff(nothing) <= 0).all() and 0 < nothing[0] < 1e-3


def test_errors_of_scores_that_add_up_and_of_others():
    together = errors_of(torch.tensor([5.0, 1.0, 3.0]), cumulative=True)
    assert together.tolist() == pytest.approx([5.0, 3.0, 1.0, 0.0], rel=1e-6)
    single = errors_of(torch.tensor([5.0, 1.0, 4.0]), cumulative=False)
    assert single.tolist() == pytest.approx([1.0, 0.5, 0.1, 0.0], rel=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.booleans())
def test_errors_fall_strictly_to_zero(scores, cumulative):
    errors = errors_of(torch.tensor(scores, dtype=torch.float64), cumulative)
    assert len(errors) == len(scores) + 1 and errors[-1] == 0
    assert np.isfinite(errors).all() and (np.diff(errors) < 0).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), percent=st.integers(25, 90))
def test_solution_is_brute_force(seed, percent):
    """On the toy net every allocation can be tried; curves are random."""
    with tempfile.TemporaryDirectory() as folder:
        problem, _ = toy_problem(folder, {"macs": f"{percent}%"})
    groups = problem.groups()
    rng = np.random.default_rng(seed)
    widths, losses = {}, {}
    for name in groups:
        num = problem.structure.group(name).num_channels
        widths[name] = (max(num // 4, 1), max(num // 2, 2), num)
        losses[name] = (*np.sort(rng.exponential(1.0, 2))[::-1].tolist(), 0.0)
    curves = _curves(widths, losses)
    fitter = Allocator(problem.structure, tuple(groups), problem.budget)
    counts = CurveSolver().solution(fitter, curves)
    assert fitter.meets(counts)
    sizes = {g.name: [*fitter.sizes(g.name), g.num_channels] for g in fitter.groups}
    tables = {
        name: dict(zip(each, curves.at(name, each), strict=True)) for name, each in sizes.items()
    }
    best = min(
        sum(tables[name][count] for name, count in zip(sizes, choice, strict=True))
        for choice in itertools.product(*sizes.values())
        if fitter.meets(dict(zip(sizes, choice, strict=True)))
    )
    assert sum(tables[name][count] for name, count in counts.items()) == pytest.approx(
        best, abs=1e-5 * max(sum(map(max, losses.values())), 1)
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), percent=st.integers(15, 80))
def test_coarse_to_fine_is_near_the_exact_solution(seed, percent):
    """Convex curves on a net too wide for one program of single steps."""
    structure = analyze(ToyNet(28).eval(), (torch.randn(1, 2, 8, 8),), form="module")
    rng = np.random.default_rng(seed)
    widths, losses = {}, {}
    for group in structure.groups:
        num, scale = group.num_channels, rng.exponential(1.0)
        widths[group.name] = tuple(sorted({max(num * i // 6, 1) for i in range(1, 7)}))
        losses[group.name] = tuple(scale * (1 - count / num) ** 2 for count in widths[group.name])
    curves = _curves(widths, losses)
    names = tuple(group.name for group in structure.groups)
    fitter = Allocator(structure, names, Budget.of({"macs": f"{percent}%"}))
    found = CurveSolver().solution(fitter, curves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raycompress.pruning.curve_solver.MAX_LEVELS", 100)
        exact = CurveSolver().solution(fitter, curves)
    total = [
        sum(float(curves.at(name, [count])[0]) for name, count in counts.items())
        for counts in (found, exact)
    ]
    assert fitter.meets(found)
    assert total[0] <= 1.1 * total[1] + 1e-9


def test_steps_are_probes_then_races():
    with tempfile.TemporaryDirectory() as folder:
        problem, executor = toy_problem(folder, {"macs": "50%"})
        pruner = CurveSolver(criterion="l1", iterations=1, neighbours=2, probes=(0.5,), share=0.5)
        search = pruner.search(problem)
        probes = next(search)
        assert isinstance(probes, Probes)
        dense, *each = probes.candidates
        assert not dense.kept and all(len(c.kept) == 1 for c in each)
        assert len(each) == len(problem.groups())
        shards = executor.num_shards
        assert {c.shards for c in probes.candidates} == {(0, shards // 2)}
        trials = executor.evaluate(list(probes.candidates))
        race = search.send(trials)
        assert isinstance(race, Race) and not race.incumbents
        assert all(
            problem.budget.excess(problem.structure.cost(c.counts), problem.structure.cost()) <= 1
            for c in race.candidates
        )


@pytest.mark.parametrize("percent", [50, 20, 10, 5])
def test_better_or_equal_to_uniform_at_any_budget(percent):
    with tempfile.TemporaryDirectory() as folder:
        problem, executor = toy_problem(folder, {"macs": f"{percent}%"})
        pruner = CurveSolver(iterations=0, share=1.0)
        try:
            winner = run_search(pruner.search(problem), executor)
        except BudgetError:
            assert percent == 5
            return
        fitter = Allocator(problem.structure, tuple(problem.groups()), problem.budget)
        uniform = fitter.fit(dict.fromkeys(problem.groups(), 1.0))
        other = replace(winner, kept=tuple(sorted(uniform.items())))
        mine, theirs = executor.evaluate([winner, other])
        assert fitter.meets(winner.counts)
        assert mine.loss <= theirs.loss


def test_probes_are_shared_by_all_budgets_of_a_job(tmp_path):
    job = {
        "name": "curves",
        "task": "raycompress.testing:ToyTask",
        "pruners": [{"type": "CurveSolver", "iterations": 1, "neighbours": 2}],
        "budgets": [{"macs": "60%"}, {"macs": "40%"}],
        "cluster": {"executor": "local"},
        "tracking": {"uri": "none"},
        "latency": {"batch_sizes": [1], "repeats": 2},
        "output": str(tmp_path),
    }
    result = raycompress.run(job)
    probes = [
        record
        for record in read_ledger(tmp_path / "ledger")
        if record["kind"] == "evaluation" and record["candidate"].get("shards") == [0, 1]
    ]
    keys = [record["key"] for record in probes]
    assert len(keys) == len(set(keys)) > len(result.trials)
    first, second = result.trials
    assert all(trial.replayed >= len(keys) for trial in (first, second))
    # The curve of a search speaks of models within the budget alone, not of its probes.
    assert len(first.curve) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probes": (1.0,)}, r"CurveSolver.probes must be fractions in \(0, 1\), got \[1.0\]"),
        ({"iterations": -1}, "CurveSolver.iterations must be at least 0, got -1"),
        ({"share": 0.0}, r"CurveSolver.share must be in \(0, 1\], got 0"),
        ({"objective": "x"}, "CurveSolver.objective must be 'loss' or 'score', got 'x'"),
        ({"perturbation": 0.0}, r"CurveSolver.perturbation must be in \(0, 1\], got 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        CurveSolver(**fields)


def test_where_all_allocations_fail_the_search_ends_with_the_reason():
    with tempfile.TemporaryDirectory() as folder:
        problem, executor = toy_problem(folder, {"macs": "50%"})
        search = CurveSolver(criterion="l1", iterations=1, neighbours=2).search(problem)
        asked = search.send(executor.evaluate(list(next(search).candidates)))
        for _ in range(2):
            failed = [Trial(candidate, failure="broken") for candidate in asked.candidates]
            try:
                asked = search.send(failed)
            except EvaluationError as error:
                assert str(error) == "every allocation within the budget failed: broken"
                break
        else:
            pytest.fail("it went on")
