import json
import math
import os
import random
from typing import ClassVar

import pytest
import torch

from raycompress.budget import Allocator, Budget
from raycompress.candidate import Candidate, Ranking, Training
from raycompress.criteria import L1
from raycompress.errors import BudgetError, ConfigError, EvaluationError
from raycompress.identity import structure_digest
from raycompress.ledger import Ledger, read_ledger
from raycompress.local import LocalExecutor
from raycompress.pruning import L1Filter, Level, SimulatedAnnealing
from raycompress.search import run_search
from raycompress.structure import analyze, slim
from raycompress.testing import PrunerContract, ToyTask, toy_problem
from raycompress.weights import WeightStore

ANNEALING = SimulatedAnnealing(iterations=4, neighbours=3, recalibrate=1)


class TestLevel(PrunerContract):
    pruner = Level(sparsity=0.5)


class TestL1(PrunerContract):
    pruner = L1Filter(sparsity=0.5)


class TestUniformL1(PrunerContract):
    pruner = L1Filter()
    budget: ClassVar = {"macs": "50%"}


def test_l1_removes_the_filters_of_least_norm(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    with torch.no_grad():
        weight = problem.model.conv3.weight
        weight.copy_(torch.ones_like(weight) * torch.arange(16).flip(0)[:, None, None, None])
    winner = run_search(L1Filter(sparsity=0.25).search(problem), executor)
    kept = executor.rankings[winner.ranking].kept(winner.counts)
    assert kept["conv3"].tolist() == list(range(12))  # 12..15 have the smallest norms


def test_level_count_is_exact_under_ties(tmp_path):
    task = ToyTask()
    model = task.build_model()
    torch.nn.init.ones_(model.conv2.weight)
    masks = Level(sparsity=0.5).prune(model, task)
    assert masks["conv2.weight"].sum() == model.conv2.weight.numel() // 2


def test_pruner_stands_alone():
    task = ToyTask()
    model = task.build_model().eval()
    masks = L1Filter().prune(model, task, budget={"macs": "50%"})
    structure = analyze(model, task.example_inputs())
    small = slim(model, structure, structure.kept(masks))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("percent", [5, 15, 30, 50, 80, 100])
def test_budget_is_met_on_the_really_slim_model_and_is_tight(percent):
    task = ToyTask(width=16)
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs())
    names = tuple(group.name for group in structure.groups)
    budget = Budget.of({"params": f"{percent}%"})
    allocator = Allocator(structure, names, budget)
    rng = random.Random(percent)
    for _ in range(5):
        counts = allocator.fit({name: rng.uniform(0.05, 1) for name in names})
        kept = {name: list(range(count)) for name, count in counts.items()}
        really = sum(p.numel() for p in slim(model, structure, kept).parameters())
        total = sum(p.numel() for p in model.parameters())
        assert really <= percent / 100 * total
        for group in structure.groups:  # nothing more fits
            if counts[group.name] < group.num_channels and percent < 100:
                more = {**counts, group.name: counts[group.name] + 1}
                used = budget.excess(structure.cost(more), structure.cost())
                assert used > 1


def test_budget_that_cant_be_reached(tmp_path):
    problem, executor = toy_problem(str(tmp_path), {"macs": "0.1%"})
    with pytest.raises(BudgetError, match=r"macs 0.1% can't be reached.*keeps macs"):
        run_search(L1Filter().search(problem), executor)


@pytest.mark.parametrize("value", ["0%", "101%", "-3", "half", 0])
def test_bad_budgets(value):
    with pytest.raises(ConfigError, match=r"budget.macs must be"):
        Budget.of({"macs": value})
    with pytest.raises(ConfigError, match="did you mean 'macs'"):
        Budget.of({"mac": "50%"})


def test_failed_candidates_are_answers_and_all_failing_is_an_error(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    good = Candidate(problem.weights)
    bad = Candidate("0" * 16)
    trials = executor.evaluate([bad, good])
    assert "are not in" in trials[0].failure and trials[0].score == -math.inf
    assert trials[1].failure is None

    def search():
        yield [bad]
        return bad

    with pytest.raises(EvaluationError, match="all 1 candidates of step 0 failed"):
        run_search(search(), executor)


def _with_ledger(folder, part="a"):
    task = ToyTask()
    structure = analyze(task.build_model().eval(), task.example_inputs())
    return LocalExecutor(
        task, structure, WeightStore(folder / "weights"), ledger=Ledger(folder / "ledger", part)
    )


def test_killed_search_is_replayed_and_evaluates_nothing_twice(tmp_path):
    problem, whole = toy_problem(str(tmp_path / "weights"), {"macs": "40%"})
    expected = run_search(ANNEALING.search(problem), whole)
    first = _with_ledger(tmp_path)
    stopped = type(problem)(**{**vars(problem), "executor": first})
    search = ANNEALING.search(stopped)
    trials = first.evaluate(next(search))
    first.evaluate(search.send(trials))
    first.ledger.close()
    second = _with_ledger(tmp_path)
    resumed = type(problem)(**{**vars(problem), "executor": second})
    assert run_search(ANNEALING.search(resumed), second) == expected
    assert first.num_evaluated + second.num_evaluated == whole.num_evaluated


def test_ledger_drops_a_torn_tail_and_keeps_the_rest(tmp_path):
    with Ledger(tmp_path, "a") as ledger:
        ledger.put({"k1": {"x": 1}, "k2": {"x": 2}})
    path = tmp_path / "a.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key":"k3","x"')
    with Ledger(tmp_path, "a") as ledger:
        assert len(ledger) == 2
        ledger.put({"k4": {"x": 4}})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["k1", "k2", "k4"]


def test_second_writer_waits_and_gives_up(tmp_path):
    from raycompress.errors import RaycompressError

    with Ledger(tmp_path, "a"), pytest.raises(RaycompressError, match="another process"):
        Ledger(tmp_path, "a", patience=0.2)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_training_is_done_once_and_its_weights_are_kept(tmp_path):
    problem, _ = toy_problem(str(tmp_path / "weights"))
    executor = _with_ledger(tmp_path)
    scores = L1().scores(problem.model, problem.structure, ["conv3"], {})
    ranking = problem.ranking("channels", scores)
    executor.publish(ranking)
    candidate = problem.candidate({"conv3": 8}, ranking, training=Training(6.0))
    first, again = executor.evaluate([candidate])[0], executor.evaluate([candidate])[0]
    assert first.weights == again.weights and again.replayed and not first.replayed
    stored = executor.host.store.get(first.weights)
    assert stored.state["conv3.weight"].shape[0] == 8 and len(stored.kept["conv3"]) == 8
    assert first.score > executor.evaluate([candidate.with_training(None)])[0].score


def test_candidate_survives_json():
    ranking = Ranking("channels", {"a": torch.arange(4), "b": torch.arange(3)})
    candidate = Candidate.of({"b": 2, "a": 4}, ranking, weights="w", training=Training(2.0, 0.1))
    assert candidate.kept == (("b", 2),)
    assert Candidate.from_key(json.loads(json.dumps(candidate.key()))) == candidate


def test_counts_of_another_structure_are_another_question(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    other = analyze(problem.model, executor.host.task.example_inputs(), ignore=["conv3"])
    assert structure_digest(other) != structure_digest(problem.structure)
    again = analyze(problem.model, executor.host.task.example_inputs())
    assert structure_digest(again) == structure_digest(problem.structure)
    ledger = Ledger(tmp_path / "ledger", "a")
    with ledger:
        first = LocalExecutor(executor.host.task, problem.structure, problem.store, ledger=ledger)
        second = LocalExecutor(executor.host.task, other, problem.store, ledger=ledger)
        dense = Candidate(problem.weights)
        assert not first.evaluate([dense])[0].replayed
        assert not second.evaluate([dense])[0].replayed
        assert first.evaluate([dense])[0].replayed


def test_units_of_one_step_share_an_fsync_that_comes_before_the_answer(tmp_path, monkeypatch):
    problem, executor = toy_problem(str(tmp_path / "w"))
    synced = []
    monkeypatch.setattr("raycompress.ledger.os.fsync", lambda handle: synced.append(handle))
    with Ledger(tmp_path / "ledger", "a") as ledger:
        executor.ledger = ledger
        for step in range(2):
            asked = [Candidate(problem.weights, recalibrate=9 * step + i) for i in range(9)]
            executor.evaluate(asked)
            assert len(synced) == step + 1  # less than a second's work each
        assert len(read_ledger(tmp_path / "ledger")) == 18
        monkeypatch.setattr("raycompress.ledger.COMMIT_SECONDS", 0.0)
        executor.evaluate([Candidate(problem.weights, recalibrate=30 + i) for i in range(3)])
        assert len(synced) == 5  # what takes longer isn't left unsafe meanwhile
    executor.evaluate([Candidate(problem.weights, recalibrate=1)])  # known: nothing to write
