"""ADMM: the projection against brute force, and the iteration on a problem with a known answer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raycompress.candidate import Candidate, Training
from raycompress.criteria import L2, Magnitude
from raycompress.errors import ConfigError
from raycompress.pruning import ADMM
from raycompress.pruning.admm import Projection
from raycompress.pruning.units import plan_units
from raycompress.search import run_search
from raycompress.testing import PrunerContract, toy_problem


class TestWeights(PrunerContract):
    pruner = ADMM(sparsity=0.6, iterations=2)


class TestChannels(PrunerContract):
    pruner = ADMM(units="channels", iterations=2)
    budget: ClassVar = {"macs": "50%"}
    gradual = True


def _projection(tmp_path, kind):
    problem, _ = toy_problem(str(tmp_path))
    criterion = Magnitude() if kind == "weights" else L2()
    units = plan_units(problem, criterion, "ADMM", 0.5)
    counts = units.final({})
    return problem, counts, Projection(problem, units.names, counts, kind)


@given(st.lists(st.integers(-3, 3), min_size=6, max_size=6), st.integers(1, 6))
def test_no_sparse_point_is_closer(values, kept):
    projection = Projection.__new__(Projection)
    projection._counts, projection._groups = {"w": kept}, []
    w = torch.tensor(values, dtype=torch.float32)
    z, _ = projection.project({"w": w})
    assert int((z["w"] != 0).sum()) <= kept
    best = min(
        float((w - w * torch.tensor([i in support for i in range(6)])).square().sum())
        for support in itertools.combinations(range(6), kept)
    )
    assert float((w - z["w"]).square().sum()) == best
    again, _ = projection.project(z)
    assert torch.equal(again["w"], z["w"])
    assert z["w"].data_ptr() != w.data_ptr()


def test_channels_of_a_coupled_group_are_projected_together(tmp_path):
    problem, counts, projection = _projection(tmp_path, "channels")
    state = projection.of(problem.model.state_dict())
    z, scores = projection.project(state)
    group = problem.structure.group("conv1")
    assert {"conv1", "conv2"} <= set(group.producers)  # the residual block
    gone = z["conv1.weight"].flatten(1).abs().sum(1) == 0
    assert torch.equal(gone, z["conv2.weight"].flatten(1).abs().sum(1) == 0)
    assert int(gone.sum()) == group.num_channels - counts["conv1"]
    rows = state["conv1.weight"].flatten(1).square().sum(1)
    rows += state["conv2.weight"].flatten(1).square().sum(1)
    # Biases are weights of the channel, too.
    rows += state["conv1.bias"].square() + state["conv2.bias"].square()
    assert torch.allclose(scores["conv1"].float(), rows, rtol=1e-5)
    assert rows[~gone].min() >= rows[gone].max()


def test_iteration_on_a_quadratic_with_a_known_solution():
    """Minimise ||w - a||^2 / 2 with two entries kept: the two largest of a."""
    a = torch.tensor([3.0, -0.5, 2.0, 0.1])
    projection = Projection.__new__(Projection)
    projection._counts, projection._groups = {"w": 2}, []
    rho, u = 0.5, torch.zeros(4)
    z = projection.project({"w": a})[0]["w"]
    gaps = []
    for _ in range(60):
        w = (a + rho * (z - u)) / (1 + rho)  # the exact minimiser of f + rho/2 ||w - z + u||^2
        z = projection.project({"w": w + u})[0]["w"]
        u = u + w - z
        gaps.append(float((w - z).norm()))
    assert gaps[-1] < 1e-4 * gaps[0]
    assert torch.allclose(z, torch.tensor([3.0, 0.0, 2.0, 0.0]), atol=1e-3)


def test_residual_falls_and_pruning_costs_less_than_at_once(tmp_path):
    problem, executor = toy_problem(str(tmp_path))

    dense = executor.evaluate([Candidate(problem.weights, training=Training(10.0))])[0].weights
    model = problem.dense(dense)
    figures = []
    trained = replace(problem, model=model, weights=dense, report=figures.append)
    pruner = ADMM(
        sparsity=0.9, iterations=12, epochs=6, rho=0.2, rho_growth=1.2, retrain_epochs=0, lr=0.05
    )
    trials = []
    winner = run_search(pruner.search(trained), executor, lambda _, step: trials.extend(step))
    residuals = [f["primal_residual"] for f in figures]
    assert len(residuals) == 12 and residuals[-1] <= 0.1 * residuals[0]
    assert figures[1]["rho"] == pytest.approx(0.24)
    layers = list(problem.layers())
    scores = Magnitude().scores(model, problem.structure, layers, {})
    plain = trained.candidate(winner.counts, trained.ranking("weights", scores))
    one_shot, start = executor.evaluate([plain, Candidate(dense)])
    assert executor.evaluate([winner])[0].loss - trials[-2].loss < one_shot.loss - start.loss


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rho": 0}, "ADMM.rho must be above 0, got 0"),
        ({"rho_growth": 0.5}, "ADMM.rho_growth must be at least 1, got 0.5"),
        ({"units": "filters"}, "ADMM.units must be 'weights' or 'channels', got 'filters'"),
        ({"iterations": 0}, "ADMM.iterations must be at least 1, got 0"),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        ADMM(**keys)
