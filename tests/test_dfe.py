"""What units cost, by numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

from raycompress.candidate import Candidate, Training
from raycompress.criteria import criterion
from raycompress.dfe import Prices
from raycompress.reconstruction import Reconstruction, lost_inputs
from raycompress.testing import toy_problem
from raycompress.training import Distillation
from raycompress.units import Evaluation, HostInfo

SIZES = {"train": 1000, "calibration": 100, "validation": 200, "test": 400}
INFO = HostInfo("t", "d", SIZES, 10, "cpu", False)


@pytest.fixture
def toy(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    prices = Prices(problem.structure, Evaluation(batch_size=32, num_shards=4), INFO)
    half = problem.structure.cost({"conv3": 8}).macs / problem.structure.cost().macs
    return problem, executor, prices, half


def test_an_evaluation_is_its_macs_times_its_examples(toy):
    _, _, prices, half = toy
    dense = Candidate("w")
    assert prices.evaluation_of(dense, {}) == 1.0
    assert prices.evaluation_of(dense, {}, "test") == 2.0
    assert prices.evaluation_of(dense, {"conv3": 8}) == pytest.approx(half)
    # Two calibration batches are 64 examples: 0.32 of a pass; a fourth isn't whole.
    assert prices.evaluation_of(replace(dense, recalibrate=2), {}) == pytest.approx(1.32)
    assert prices.evaluation_of(replace(dense, recalibrate=4), {}) == pytest.approx(1.48)


def test_rounds_of_a_race_add_up_to_one_evaluation(toy):
    _, _, prices, _ = toy
    whole = Candidate("w", recalibrate=2)
    rounds = [replace(whole, shards=(a, b)) for a, b in ((0, 2), (2, 3), (3, 4))]
    assert [prices.evaluation_of(c, {}) for c in rounds] == pytest.approx([0.82, 0.25, 0.25])


def test_a_training_step_is_three_passes(toy):
    _, _, prices, half = toy
    training = Training(0.5)
    candidate = Candidate("w", training=training)
    assert prices.training_of(candidate, {}) == 3 * 500 / 200
    assert prices.training_of(candidate, {"conv3": 8}) == pytest.approx(7.5 * half)
    by_steps = replace(candidate, training=Training(0.0, steps=5))  # half of an epoch of 10
    assert prices.training_of(by_steps, {}) == 7.5
    taught = replace(training, methods=(Distillation(teacher="w"),))
    assert prices.training_of(replace(candidate, training=taught), {"conv3": 8}) == (
        pytest.approx(7.5 * half + 2.5)  # the teacher's forward passes are dense
    )
    built = Candidate("w", recalibrate=2, training=Training(0.0))
    assert prices.training_of(built, {}) == pytest.approx(0.32)


def test_reconstruction_is_a_dense_pass_and_half_of_the_model_for_each_layer_that_lost_inputs(toy):
    problem, _, prices, _ = toy
    counts = {"conv1": 4, "conv3": 8}
    kept = {name: torch.arange(count) for name, count in counts.items()}
    layers, _ = lost_inputs(problem.structure, kept)
    assert set(layers) == {"conv2", "conv3", "fc"}
    share = problem.structure.cost(counts).macs / problem.structure.cost().macs
    candidate = Candidate("w", reconstruct=Reconstruction("w", batches=2))
    expected = share * (1 + 0.16) + 0.32 * (1 + 3 * share / 2)
    assert prices.evaluation_of(candidate, counts) == pytest.approx(expected)


def test_statistics_cost_a_pass_and_gradients_two_more(toy):
    _, _, prices, _ = toy
    seen = Candidate("w", collect=criterion("mean_activation", "c", "channels"))
    assert prices.collection_of(seen) == 0.5
    seen = Candidate("w", collect=criterion("taylor", "c", "channels"))
    assert prices.collection_of(seen) == 1.5


def test_what_weights_have_lost_is_not_paid_for(toy):
    problem, executor, _, half = toy
    ranking = problem.ranking("channels", {"conv1": torch.rand(8), "conv3": torch.rand(16)})
    slim = problem.candidate({"conv3": 8}, ranking, training=Training(0.0))
    weights = executor.evaluate([slim])[0].trained()
    before = executor.dfe
    trial = executor.evaluate([Candidate(weights)])[0]
    assert trial.dfe == executor.dfe - before == pytest.approx(half)
    both = replace(problem.candidate({"conv1": 4}, ranking), weights=weights)
    assert executor.counts(both) == {"conv1": 4, "conv3": 8}
    cost = problem.structure.cost({"conv1": 4, "conv3": 8}).macs / problem.structure.cost().macs
    assert executor.evaluate([both])[0].dfe == pytest.approx(cost)
    # Another executor, as after a restart, reads it from the store.
    assert type(executor)(executor.host.task, problem.structure, problem.store).counts(
        Candidate(weights)
    ) == {"conv3": 8}
