"""AutoCompress: its rounds, slim parents, and purification that changes nothing."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raycompress.candidate import Candidate, Ranking, Shard, Training, Trial
from raycompress.driver import run
from raycompress.errors import BudgetError, ConfigError
from raycompress.pruning import AutoCompress, NNISimulatedAnnealing, SimulatedAnnealing
from raycompress.pruning.admm import Projection
from raycompress.pruning.pruner import allocator
from raycompress.pruning.purification import purified, strengths
from raycompress.search import run_search
from raycompress.structure import slim
from raycompress.targets import config_list
from raycompress.testing import PrunerContract, ToyTask, toy_problem
from raycompress.weights import Weights

QUICK = AutoCompress(
    rounds=2, iterations=1, neighbours=2, recalibrate=1, admm_iterations=2, admm_epochs=0.4,
    retrain_epochs=0.4,
)  # fmt: skip


class TestMacs(PrunerContract):
    pruner = QUICK
    budget: ClassVar = {"macs": "40%"}
    gradual = True


class TestParams(PrunerContract):
    pruner = replace(QUICK, rounds=3, chains=2, reconstruct=False, purify=0.5, round_to=2)
    budget: ClassVar = {"params": "30%", "macs": "60%"}
    gradual = True


@given(st.floats(1.01, 50), st.integers(1, 8))
def test_rounds_share_the_budget_geometrically_and_the_last_ends_at_it(excess, rounds):
    pruner = replace(QUICK, rounds=rounds)
    path = [excess]
    for number in range(1, rounds + 1):
        path.append(pruner.allowed(path[-1], number))
    assert path[-1] == 1.0
    ratios = [b / a for a, b in itertools.pairwise(path)]
    assert ratios == pytest.approx([excess ** (-1 / rounds)] * rounds)


def test_rounds_by_hand():
    # From 8 times the budget in three rounds: halves. A round that ends lower leaves less to do.
    pruner = replace(QUICK, rounds=3)
    found = [pruner.allowed(8, 1), pruner.allowed(4, 2), pruner.allowed(2, 3)]
    assert found == pytest.approx([4, 2, 1])
    assert pruner.allowed(2.25, 2) == pytest.approx(1.5)


def test_each_round_prunes_what_the_last_one_left(tmp_path):
    problem, executor = toy_problem(str(tmp_path), {"macs": "20%"})
    pruner = replace(QUICK, rounds=3)
    trials = []
    winner = run_search(pruner.search(problem), executor, lambda _, step: trials.extend(step))
    whole = allocator(problem, list(problem.groups()), "", 1, 1)
    sizes = {group.name: group.num_channels for group in whole.groups}
    rounds = [t for t in trials if t.candidate.training and not t.candidate.training.methods]
    assert len(rounds) == 3 and rounds[-1].weights == winner.weights
    parent, excess = {name: set(range(n)) for name, n in sizes.items()}, whole.excess(sizes)
    before = problem.weights
    for number, trial in enumerate(rounds, 1):
        allowed = pruner.allowed(excess, number)
        own = [t.candidate for t in trials if t.candidate.weights == before and t.candidate.kept]
        annealed = [c for c in own if c.training is None]
        assert annealed
        for candidate in annealed:
            assert whole.excess({**sizes, **candidate.counts}) <= allowed + 1e-9
            assert candidate.reconstruct.dense == before
        stored = problem.store.get(trial.weights)
        kept = {name: set(stored.kept.get(name, range(n))) for name, n in sizes.items()}
        assert all(kept[name] <= parent[name] for name in sizes) and kept != parent
        # Weights are those of a slim model, not of a masked one.
        assert stored.state["conv3.weight"].shape[:2] == (len(kept["conv3"]), len(kept["conv1"]))
        parent, excess = kept, whole.excess({name: len(k) for name, k in kept.items()})
        before = trial.weights
    assert excess <= 1 and {n: len(k) for n, k in parent.items()} == {**sizes, **winner.counts}


def test_what_is_within_the_budget_is_left_alone(tmp_path):
    problem, executor = toy_problem(str(tmp_path), {"macs": "100%"})
    assert run_search(QUICK.search(problem), executor) == Candidate(problem.weights)
    assert executor.dfe == 3  # the dense model, as it is and recalibrated


def test_prune_leaves_the_trained_weights():
    task = ToyTask()
    model = task.build_model().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = QUICK.prune(model, task, budget={"macs": "40%"})
    state = model.state_dict()
    assert not torch.equal(state["fc.weight"], before["fc.weight"])
    for name, mask in masks.items():
        assert not state[name][~mask].any()


def _dead(model):
    """Channels that nothing reads (group conv1: 2; conv3: 3, 7), or that are zero (conv3: 11)."""
    with torch.no_grad():
        model.conv2.weight[:, 2], model.conv3.weight[:, 2] = 0, 0
        model.fc.weight[:, [3, 7]] = 0
        model.bn3.weight[11], model.bn3.bias[11] = 0, 0
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))


def test_purification_of_dead_channels_changes_nothing(tmp_path):
    problem, _ = toy_problem(str(tmp_path), {"macs": "99%"})
    model = problem.model.double()
    _dead(model)
    fitter = allocator(problem, list(problem.groups()), "", 1, 1)
    kept = {group.name: torch.arange(group.num_channels) for group in fitter.groups}
    counts, scores = purified(model, fitter, kept, 0.0)
    assert counts == {"conv1": 7, "conv3": 13}
    left = Ranking("channels", {n: s.argsort(stable=True) for n, s in scores.items()}).kept(counts)
    assert set(range(8)) - set(left["conv1"].tolist()) == {2}
    assert set(range(16)) - set(left["conv3"].tolist()) == {3, 7, 11}
    small = slim(model, problem.structure, left)
    images = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    assert torch.allclose(small(images), model(images), atol=1e-12)


def test_strengths_by_hand(tmp_path):
    problem, _ = toy_problem(str(tmp_path))
    model, group = problem.model, problem.structure.group("conv3")
    with torch.no_grad():
        model.bn3.weight[:] = 3.0
        model.bn3.bias[:] = 4.0
        model.bn3.weight[0], model.bn3.bias[0] = 0.0, 2.5
        model.fc.weight[:] = 1.0
        model.fc.weight[:, 1] = 2.0
    kept = torch.tensor([0, 1, 2, 3])
    found = strengths(model, group, kept)
    # Made: 2.5, 5, 5, 5 (mean 4.375). Read: root of 3 times 1, 2, 1, 1 (mean 1.25).
    expected = [2.5 / 4.375 / 1.25, 5 / 4.375 * 2 / 1.25, 5 / 4.375 / 1.25, 5 / 4.375 / 1.25]
    assert found[:4].tolist() == pytest.approx(expected)
    assert torch.isneginf(found[4:]).all()


def test_purification_keeps_what_a_group_must_keep(tmp_path):
    problem, _ = toy_problem(str(tmp_path), {"macs": "99%"})
    _dead(problem.model)
    fitter = allocator(problem, list(problem.groups()), "", 4, 8)
    kept = {"conv1": torch.arange(8), "conv3": torch.arange(16)}
    counts, _ = purified(problem.model, fitter, kept, 0.0)
    assert counts == {"conv1": 8, "conv3": 16}  # 13 alive, rounded up to a multiple of 4
    counts, _ = purified(problem.model, fitter, kept, 1e9)
    assert counts == {"conv1": 8, "conv3": 8}


@pytest.mark.parametrize(("change", "taken"), [(0.0, True), (1e-9, True), (1e-3, False)])
def test_purification_that_costs_something_is_not_taken(tmp_path, change, taken):
    problem, _ = toy_problem(str(tmp_path), {"macs": "99%"})
    _dead(problem.model)
    weights = problem.store.put(Weights(problem.model.state_dict(), {}))
    names = list(problem.groups())
    fitter = allocator(problem, names, "", 1, 1)
    counts = {group.name: group.num_channels for group in fitter.groups}
    ranking = problem.ranking("channels", {n: torch.arange(float(c)) for n, c in counts.items()})
    search = QUICK._purify(problem, fitter, counts, ranking, weights)
    plain, pure = next(search)
    assert sum(pure.counts.values()) < sum(counts.values())
    with pytest.raises(StopIteration) as stop:
        search.send([_judged(plain, 1.0), _judged(pure, 1.0 + change)])
    assert (stop.value.value[0] != counts) is taken


def _judged(candidate, loss):
    return Trial(candidate, (Shard(1, 0.0, loss),))


def test_admm_on_a_slim_parent_never_brings_back_what_is_gone(tmp_path):
    """Not even where channels that are left happen to be zero."""
    problem, executor = toy_problem(str(tmp_path))
    ranking = problem.ranking("channels", {"conv3": torch.arange(16.0)})  # 0 to 7 go
    asked = problem.candidate({"conv3": 8}, ranking, training=Training(0.0))
    parent = executor.evaluate([asked])[0].weights
    projection = Projection(
        problem, ["conv1", "conv3"], {"conv1": 8, "conv3": 4}, "channels", parent
    )
    state = projection.of(problem.dense(parent).state_dict())
    state["conv3.weight"][12:] = 0
    state["conv3.bias"][12:] = 0
    z, scores = projection.project(state)
    assert torch.isneginf(scores["conv3"][:8]).all()
    assert (scores["conv3"][12:] == 0).all()
    assert z["conv3.weight"][8:12].flatten(1).any(1).all() and not z["conv3.weight"][:8].any()
    narrow = projection.narrowed(z)
    assert narrow["conv3.weight"].shape == (8, 8, 3, 3)
    assert torch.equal(narrow["conv3.weight"], z["conv3.weight"][8:])
    assert torch.equal(narrow["conv1.weight"], z["conv1.weight"])


def test_what_it_refuses_before_anything_starts(tmp_path):
    problem, _ = toy_problem(str(tmp_path), {"macs": "0.1%"})
    with pytest.raises(BudgetError, match="can't be reached"):
        QUICK.check(problem)
    with pytest.raises(ConfigError, match="AutoCompress needs a budget"):
        QUICK.check(replace(problem, budget=None))
    targets = config_list([{"op_names": ["conv3"], "sparsity": 0.5}])
    with pytest.raises(ConfigError, match=r"'conv3' a sparsity, which AutoCompress is to find"):
        QUICK.check(replace(problem, targets=targets))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rounds": 0}, r"AutoCompress\.rounds must be at least 1, got 0"),
        ({"iterations": -1}, r"AutoCompress\.iterations must be at least 0, got -1"),
        ({"admm_epochs": 0}, r"AutoCompress\.admm_epochs must be above 0, got 0"),
        ({"purify": 1}, r"AutoCompress\.purify must be in \[0, 1\), got 1"),
        ({"retrain_epochs": -1}, r"AutoCompress\.retrain_epochs must be 0 or more, got -1"),
        ({"rho_growth": 0.5}, r"AutoCompress\.rho_growth must be at least 1, got 0\.5"),
    ],
)
def test_bad_fields(keys, message):
    with pytest.raises(ConfigError, match=message):
        AutoCompress(**keys)


def test_a_job_ends_in_the_model_that_the_last_round_left(tmp_path):
    """Without recovery; a second run of it trains nothing."""
    job = {
        "name": "toy",
        "task": "raycompress.testing:ToyTask",
        "model": {"pretrain": {"epochs": 4.0}},
        "pruners": [
            {
                "type": "AutoCompress",
                "rounds": 2,
                "iterations": 2,
                "admm_iterations": 1,
                "admm_epochs": 0.5,
                "retrain_epochs": 1.0,
            }
        ],
        "budgets": [{"macs": "30%"}],
        "latency": {"batch_sizes": [1], "repeats": 1},
        "cluster": {"executor": "local"},
        "tracking": {"uri": "none"},
        "output": str(tmp_path),
    }
    (trial,) = run(job).trials
    record = json.loads((tmp_path / "trials" / trial.name / "result.json").read_text())
    assert trial.weights == record["winner"]["weights"] and trial.evaluations > 0
    assert trial.row("slim").score_validation == record["score"] > 0.6
    assert trial.verification.kind == "exact" and trial.budget_met
    assert {"primal_residual", "temperature", "purified"} <= {
        name for step in trial.curve for name in step.figures
    }
    (tmp_path / "trials" / trial.name / "result.json").unlink()  # as if it had been stopped here
    (again,) = run(job).trials
    assert again.weights == trial.weights and again.evaluations == 0


class Steps:
    """Milliseconds that rise in steps of four channels, as on real devices."""

    def latency_ms(self, kept=None):
        counts = {"conv1": 8, "conv3": 16, **(kept or {})}
        return 1.0 + sum((n + 3) // 4 + 0.1 * (n % 4 > 0) for n in counts.values())


@pytest.mark.parametrize(
    "pruner",
    [QUICK, NNISimulatedAnnealing(), SimulatedAnnealing(iterations=2, recalibrate=0)],
    ids=lambda pruner: type(pruner).__name__,
)
def test_latency_is_a_budget_too(tmp_path, pruner):
    problem, executor = toy_problem(str(tmp_path), {"latency_ms": 4.2, "macs": "70%"})
    problem = replace(problem, latency=Steps())
    winner = run_search(pruner.search(problem), executor)
    assert Steps().latency_ms(winner.counts) <= 4.2 < Steps().latency_ms()
    assert problem.structure.cost(winner.counts).macs <= 0.7 * problem.structure.cost().macs
