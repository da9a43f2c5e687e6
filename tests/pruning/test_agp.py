"""Gradual pruning: the schedule by hand, and that it arrives."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raycompress.errors import ConfigError
from raycompress.masks import num_kept
from raycompress.pruning import AGP
from raycompress.pruning.agp import Ramp
from raycompress.search import run_search
from raycompress.targets import config_list
from raycompress.testing import PrunerContract, toy_problem


class TestWeights(PrunerContract):
    pruner = AGP(final_sparsity=0.8, end=2, frequency=1)


class TestChannels(PrunerContract):
    pruner = AGP(criterion="l1", end=4, frequency=2, start=1, unit="step")
    budget: ClassVar = {"macs": "50%"}
    gradual = True


def test_cubic_by_hand():
    ramp = Ramp(initial=0.0, final=0.8, start=2, end=6, frequency=1, power=3)
    assert ramp.times() == [2, 3, 4, 5, 6]
    # s = 0.8 * (1 - (1 - p) ** 3) at p = 0, 1/4, 1/2, 3/4, 1
    for time, expected in ((2, 0.0), (3, 0.4625), (4, 0.7), (5, 0.7875), (6, 0.8)):
        assert ramp.sparsity(time) == pytest.approx(expected, abs=1e-12)
    assert ramp.sparsity(1) == 0 and ramp.sparsity(99) == 0.8  # clipped on both sides
    assert ramp.sparsity(3.5) == ramp.sparsity(3)  # nothing goes between two prunings
    linear = Ramp(initial=0.2, final=0.8, start=2, end=6, frequency=1, power=1)
    assert linear.sparsity(3) == pytest.approx(0.35)


@given(
    st.floats(0, 10), st.floats(0.1, 10), st.floats(0.05, 12), st.floats(0, 0.99), st.floats(0, 0.9)
)
def test_every_frequency_reaches_the_final_sparsity(start, span, frequency, final, initial):
    final = max(final, initial)
    ramp = Ramp(initial, final, start, start + span, frequency, 3)
    times = ramp.times()
    assert times[0] == start and times[-1] == start + span
    assert all(a < b for a, b in itertools.pairwise(times))
    reached = [ramp.sparsity(t) for t in times]
    assert reached[-1] == final and all(0 <= s <= final + 1e-12 for s in reached)
    assert reached == sorted(reached)


def test_layers_with_schedules_of_their_own(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    targets = config_list(
        [
            {
                "op_types": ["Conv2d"],
                "initial_sparsity": 0.2,
                "final_sparsity": 0.5,
                "start_epoch": 0,
                "end_epoch": 2,
                "frequency": 2,
            },
            {
                "op_names": ["fc"],
                "final_sparsity": 0.6,
                "start_epoch": 1,
                "end_epoch": 3,
                "frequency": 1,
            },
        ]
    )
    steps = []
    pruner = AGP(shape="linear", end=3, total=3)
    run_search(
        pruner.search(replace(problem, targets=targets)),
        executor,
        lambda _, trials: steps.extend(trials),
    )
    # Pruned at 0 and 2 (convolutions) and at 1, 2 and 3 (the linear layer).
    kept = [t.candidate.counts for t in steps]
    conv, fc = 16 * 8 * 9, 3 * 16
    expected = [(0.2, 0.0), (0.2, 0.0), (0.5, 0.3), (0.5, 0.6)]
    assert len(kept) == 4
    for counts, (conv_sparsity, fc_sparsity) in zip(kept, expected, strict=True):
        assert counts.get("conv3.weight", conv) == num_kept(conv, conv_sparsity)
        assert counts.get("fc.weight", fc) == num_kept(fc, fc_sparsity)
    assert [t.candidate.training.epochs for t in steps] == [1, 1, 1, 0]


def _run(tmp_path, pruner, budget=None):
    problem, executor = toy_problem(str(tmp_path), budget)
    steps = []
    winner = run_search(pruner.search(problem), executor, lambda _, trials: steps.extend(trials))
    return problem, executor, winner, steps


def test_weights_stay_removed_and_the_count_is_exact(tmp_path):
    pruner = AGP(final_sparsity=0.75, initial_sparsity=0.25, end=3, frequency=2, total=5)
    problem, executor, winner, steps = _run(tmp_path, pruner)
    name = "conv3.weight"
    size = problem.model.get_parameter(name).numel()
    before = None
    for trial, time in zip(steps, (0, 2, 3), strict=True):
        state = executor.host.store.get(trial.weights).state
        sparsity = 0.75 - 0.5 * (1 - min(time / 3, 1)) ** 3
        alive = state[name] != 0
        assert int(alive.sum()) == num_kept(size, sparsity)
        assert before is None or not (alive & ~before).any()
        before = alive
    assert int(executor.host.masks(winner)[name].sum()) == num_kept(size, 0.75)
    assert [t.candidate.training.epochs for t in steps] == [2, 1, 2]


def test_channels_leave_the_model_as_it_trains(tmp_path):
    pruner = AGP(criterion="l2", final_sparsity=0.5, end=2, frequency=1)
    problem, executor, winner, steps = _run(tmp_path, pruner)
    kept = [executor.host.store.get(t.weights).kept.get("conv3", range(16)) for t in steps]
    assert [len(k) for k in kept] == [16, num_kept(16, 0.5 * 0.875), 8]
    assert set(kept[2]) < set(kept[1])
    macs = [problem.structure.cost(t.candidate.counts).macs for t in steps]
    assert macs[0] > macs[1] > macs[2]
    assert winner.weights == steps[-1].weights and winner.training is None


def test_by_step_takes_exactly_so_many_steps(tmp_path):
    pruner = AGP(
        final_sparsity=0.5, unit="step", start=2, end=9, frequency=4, total=10, criterion="l1"
    )
    _, _, _, steps = _run(tmp_path, pruner)
    assert [t.candidate.training.steps for t in steps] == [2, 4, 3, 1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"frequency": 0}, "AGP.frequency must be above 0, got 0"),
        ({"start": 5, "end": 5}, "0 <= start < end must hold, got 5 and 5"),
        ({"end": 3, "total": 2}, r"AGP.total must be at least end \(3\), got 2"),
        ({"final_sparsity": 1.2}, r"AGP.final_sparsity must be in \[0, 1\), got 1.2"),
        ({"final_sparsity": 0.3, "initial_sparsity": 0.5}, "at most final_sparsity"),
        ({"unit": "step", "frequency": 0.5}, "AGP.frequency must be whole steps, got 0.5"),
        ({"criterion": "lvel"}, "AGP.criterion: no criterion 'lvel'; did you mean 'level'"),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        AGP(**keys)
