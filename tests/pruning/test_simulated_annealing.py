"""Simulated annealing: its acceptance, its budgets on really slim models, chains, weights kept."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from raycompress.candidate import Shard, Trial
from raycompress.driver import run
from raycompress.errors import BudgetError, ConfigError
from raycompress.pruning import L1Filter, SimulatedAnnealing
from raycompress.pruning.annealing import accepted_up_to
from raycompress.pruning.pruner import allocator
from raycompress.reconstruction import Reconstruction
from raycompress.search import run_search
from raycompress.structure import analyze, slim
from raycompress.targets import config_list
from raycompress.testing import PrunerContract, ToyTask, toy_problem

PLAIN = SimulatedAnnealing(iterations=4, neighbours=3, recalibrate=1, reconstruct=False)


class TestPlain(PrunerContract):
    pruner = PLAIN
    budget: ClassVar = {"macs": "40%"}


class TestChains(PrunerContract):
    pruner = SimulatedAnnealing(iterations=2, neighbours=2, chains=3, recalibrate=1, round_to=2)
    budget: ClassVar = {"params": "30%", "macs": "60%"}


class Told:
    """Answers with an energy that is a function of the counts, as loss and as minus the score."""

    num_shards = 1

    def __init__(self, energy):
        self.energy, self.asked = energy, []

    def publish(self, ranking):
        pass

    def evaluate(self, candidates, split="validation"):
        self.asked.append(list(candidates))
        energies = [self.energy(c.counts) for c in candidates]
        return [
            Trial(c, failure="told to fail") if math.isinf(e) else Trial(c, (Shard(1, -e, e),))
            for c, e in zip(candidates, energies, strict=True)
        ]


def _told(tmp_path, pruner, energy, budget, seed=0):
    problem, _ = toy_problem(str(tmp_path), budget, seed)
    told, figures = Told(energy), []
    problem = replace(problem, executor=told, report=figures.append)
    winner = run_search(pruner.search(problem), told)
    return problem, told, figures, winner


def _conv3(counts):
    return counts.get("conv3", 16)


@pytest.mark.parametrize(("difference", "temperature"), [(1.0, 1.0), (0.3, 0.1), (2.0, 5.0)])
def test_acceptance_follows_metropolis(difference, temperature):
    rng = random.Random(0)
    draws = 4000
    share = (
        sum(difference <= accepted_up_to(temperature, rng.random()) for _ in range(draws)) / draws
    )
    expected = math.exp(-difference / temperature)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_what_is_better_is_always_accepted():
    assert accepted_up_to(0.0, 0.999) == 0.0 == accepted_up_to(0.0, 0.0)
    assert accepted_up_to(1e-9, 0.999) >= 0.0
    assert accepted_up_to(2.0, math.exp(-3)) == pytest.approx(6.0)


def test_temperature_gives_the_asked_acceptances():
    annealing = SimulatedAnnealing(iterations=20, start_acceptance=0.7, end_acceptance=0.02)
    scale = 0.37
    assert math.exp(-scale / annealing.temperature(1, scale)) == pytest.approx(0.7)
    assert math.exp(-scale / annealing.temperature(20, scale)) == pytest.approx(0.02)
    ratios = [annealing.temperature(i + 1, 1) / annealing.temperature(i, 1) for i in range(1, 20)]
    assert ratios == pytest.approx([ratios[0]] * 19)  # geometric


@pytest.mark.parametrize(("acceptance", "delta"), [(0.8, 1e-3), (0.3, 1.0), (0.01, 1e4)])
def test_a_search_accepts_the_median_difference_as_often_as_asked(tmp_path, acceptance, delta):
    """Whatever the metric's scale. Each chain has one draw: all neighbours are worse by delta."""
    chains = 400
    pruner = SimulatedAnnealing(
        iterations=2, neighbours=1, chains=chains, recalibrate=0,
        start_acceptance=acceptance, end_acceptance=acceptance,
    )  # fmt: skip
    problem, _ = toy_problem(str(tmp_path), {"params": "50%"})
    fitter = allocator(problem, list(problem.groups()), "", 1, 1)
    start = fitter.fit({"conv1": 1.0, "conv3": 1.0})
    _, _, figures, winner = _told(
        tmp_path,
        pruner,
        lambda counts: 0.0 if counts == start else delta,
        {"params": "50%"},
    )
    assert figures[0]["moves"] == 0 and winner.counts == start
    share = figures[1]["moves"] / chains
    error = math.sqrt(acceptance * (1 - acceptance) / chains)
    assert abs(share - acceptance) < 4 * error


@pytest.mark.parametrize("chains", [1, 4])
@pytest.mark.parametrize("objective", ["loss", "score"])
def test_the_best_ever_seen_wins(tmp_path, chains, objective):
    """It prefers channels in conv3; the winner is the best of all that was asked."""
    pruner = SimulatedAnnealing(iterations=20, chains=chains, recalibrate=0, objective=objective)
    _, told, _, winner = _told(tmp_path, pruner, lambda c: -_conv3(c), {"params": "50%"})
    pruned = [candidate for step in told.asked for candidate in step]
    scores = [_conv3(candidate.counts) for candidate in pruned]
    assert _conv3(winner.counts) == max(scores) > scores[0]
    for step in told.asked:  # what several chains propose is asked for once
        assert len(set(step)) == len(step)


def _bumpy(counts):
    return random.Random(str(sorted(counts.items()))).random()


def test_chains_walk_for_themselves_and_all_are_asked_at_once(tmp_path):
    task = ToyTask(width=64)
    one = replace(PLAIN, recalibrate=0)
    _, alone, _ = _wide(tmp_path, task, {"params": "40%"}, one)
    three = replace(one, chains=3)
    _, told, winner = _wide(tmp_path, task, {"params": "40%"}, three)
    assert len(alone.asked) == len(told.asked) == 1 + three.iterations
    assert 1 + 2 * one.neighbours < len(told.asked[0]) <= 1 + 3 * one.neighbours  # one start
    assert alone.asked[0] == told.asked[0][: 1 + one.neighbours]
    here = [candidate for step in told.asked for candidate in step]
    assert _bumpy(winner.counts) == min(_bumpy(candidate.counts) for candidate in here)


def test_failed_candidates_are_passed_over(tmp_path):
    """Half of all allocations fail, the start among them."""
    starts = []

    def energy(counts):
        starts.append(counts)
        return math.inf if counts == starts[0] or _bumpy(counts) < 0.5 else _bumpy(counts)

    pruner = SimulatedAnnealing(iterations=8, recalibrate=0)
    _, told, winner = _wide(tmp_path, ToyTask(width=32), {"params": "50%"}, pruner, energy)
    asked = {candidate for step in told.asked for candidate in step}
    assert any(math.isinf(energy(candidate.counts)) for candidate in asked)
    assert math.isfinite(energy(winner.counts))
    assert energy(winner.counts) == min(energy(candidate.counts) for candidate in asked)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("resource", ["params", "macs"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_every_candidate_meets_the_budget_on_the_really_slim_model(
    tmp_path, sparsity, resource, round_to
):
    """Also where NNI's rejection of draws hardly ever ends (issue 3865)."""
    pruner = SimulatedAnnealing(iterations=6, chains=2, recalibrate=0, round_to=round_to)
    budget = {resource: f"{100 * (1 - sparsity):g}%"}
    problem, told, _ = _wide(tmp_path, ToyTask(width=64), budget, pruner)
    dense = sum(p.numel() for p in problem.model.parameters())
    asked = {candidate for step in told.asked for candidate in step}
    assert len(asked) > 1
    for candidate in asked:
        counts = candidate.counts
        if resource == "params":
            kept = {name: list(range(count)) for name, count in counts.items()}
            small = slim(problem.model, problem.structure, kept)
            assert sum(p.numel() for p in small.parameters()) <= (1 - sparsity) * dense
        else:
            cost = problem.structure.cost(counts)
            assert cost.macs <= (1 - sparsity) * problem.structure.cost().macs
        assert all(count % round_to == 0 for count in counts.values())


def _wide(tmp_path, task, budget, pruner, energy=_bumpy):
    problem, _ = toy_problem(str(tmp_path), budget)
    model = task.build_model().eval()
    told = Told(energy)
    problem = replace(
        problem, model=model, structure=analyze(model, task.example_inputs()), executor=told
    )
    return problem, told, run_search(pruner.search(problem), told)


def test_at_the_least_that_can_be_kept_there_is_one_answer_and_the_search_ends(tmp_path):
    problem, _ = toy_problem(str(tmp_path), {"params": "50%"})
    least = problem.structure.cost(dict.fromkeys(problem.groups(), 1)).params
    pruner = SimulatedAnnealing(iterations=50, recalibrate=0)
    _, told, _, winner = _told(tmp_path, pruner, _bumpy, {"params": least})
    assert winner.counts == {"conv1": 1, "conv3": 1} and told.asked == [[winner]]
    with pytest.raises(BudgetError, match=r"can't be reached"):
        pruner.check(replace(problem, budget=type(problem.budget).of({"params": least - 1})))


def test_the_winner_carries_its_reconstruction_and_its_weights_are_kept(tmp_path):
    pruner = SimulatedAnnealing(iterations=2, neighbours=2, recalibrate=1)
    problem, executor = toy_problem(str(tmp_path), {"macs": "30%"})
    winner = run_search(pruner.search(problem), executor)
    assert winner.reconstruct == Reconstruction(dense=problem.weights)
    judged = executor.evaluate([winner])[0]
    task, model = ToyTask(), ToyTask().build_model().eval()
    masks = pruner.prune(model, task, budget={"macs": "30%"})
    # The slim model of the masks and the model that `prune` leaves is the one that was judged.
    small = slim(model, problem.structure, masks=masks)
    images, labels = task.dataset("validation").tensors
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(small(images), labels))
    assert loss == pytest.approx(judged.loss, rel=1e-4)
    without = executor.evaluate([replace(winner, reconstruct=None)])[0]
    assert abs(judged.loss - without.loss) > 1e-3


def test_a_job_saves_the_weights_that_the_search_judged(tmp_path):
    """Without recovery; the slim model scores what the winner scored."""
    result = run(
        {
            "name": "toy",
            "task": "raycompress.testing:ToyTask",
            "model": {"pretrain": {"epochs": 4.0}},
            "pruners": [{"type": "SimulatedAnnealing", "iterations": 2, "chains": 2}],
            "budgets": [{"macs": "25%"}],
            "latency": {"batch_sizes": [1], "repeats": 1},
            "cluster": {"executor": "local"},
            "tracking": {"uri": "none"},
            "output": str(tmp_path),
        }
    )
    (trial,) = result.trials
    assert trial.row("slim").score_validation == max(
        step.score for step in trial.curve if step.loss == trial.curve[-1].best_loss
    )
    record = json.loads((tmp_path / "trials" / trial.name / "result.json").read_text())
    assert record["winner"]["reconstruct"] is not None and record["score"] > 0.5
    # It costs more than validation data: calibration data, for norms and least squares.
    assert trial.dfe > len(trial.curve)


def test_pruners_that_neither_train_nor_reconstruct_leave_the_model_as_it_is():
    task = ToyTask()
    model = task.build_model().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for pruner in (PLAIN, L1Filter()):
        pruner.prune(model, task, budget={"macs": "50%"})
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_targets_with_sparsities_are_refused(tmp_path):
    problem, _ = toy_problem(str(tmp_path), {"macs": "50%"})
    targets = config_list([{"op_names": ["conv3"], "sparsity": 0.5}])
    with pytest.raises(ConfigError, match=r"'conv3' a sparsity, which SimulatedAnnealing is to"):
        PLAIN.check(replace(problem, targets=targets))
    with pytest.raises(ConfigError, match="SimulatedAnnealing needs a budget"):
        PLAIN.check(replace(problem, budget=None))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chains": 0}, r"SimulatedAnnealing\.chains must be at least 1, got 0"),
        ({"neighbours": 0}, r"SimulatedAnnealing\.neighbours must be at least 1, got 0"),
        ({"perturbation": 0}, r"SimulatedAnnealing\.perturbation must be in \(0, 1\], got 0"),
        ({"objective": "f1"}, r"SimulatedAnnealing\.objective must be 'loss' or 'score', got 'f1'"),
        ({"start_acceptance": 1.0}, r"start_acceptance < 1 must hold, got 0\.01 and 1"),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        SimulatedAnnealing(**keys)
