"""Whole jobs on Ray: samples of studies, stopped trials, and trials that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search.optuna import OptunaSearch

from raycompress.driver import run
from raycompress.errors import EvaluationError
from raycompress.ledger import read_ledger
from raycompress.results import JobResult

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
SPACE: dict[str, Any] = {
    "type": "FixedAllocation",
    "criterion": {"choice": ["l1", "fpgm"]},
    "sparsities": {"*": {"uniform": [0.05, 0.95], "each": True}},
}


def job(output: Path, executor: str = "ray", concurrent: int | None = 1, **keys: Any) -> Any:
    cluster = {"executor": executor, "replicas": 1, "cpus": 0.5, "max_concurrent": concurrent}
    return {
        "name": "tuned",
        "task": "raycompress.testing:ToyTask",
        "pruners": [SPACE],
        "tune": {"num_samples": 3},
        "budgets": [{"params": "50%"}],
        "latency": {"batch_sizes": [1], "repeats": 1},
        "cluster": cluster,
        "tracking": {"uri": "none"},
        "output": str(output),
        **keys,
    }


def points(result: JobResult) -> list[Any]:
    return [(row.name, row.settings, row.state, row.score, row.loss) for row in result.samples]


def make_searcher(space: Any, metric: Any, mode: Any, seed: int) -> OptunaSearch:
    return OptunaSearch(space, metric=metric, mode=mode, seed=seed)


def test_samples_are_those_of_the_local_executor_and_run_once(tmp_path: Path) -> None:
    local = run(job(tmp_path / "local", "local", tune={"num_samples": 4}))
    first = run(job(tmp_path / "ray"))
    assert points(first) == points(local)[:3] and first.trials[0].budget_met
    before = {r["key"] for r in read_ledger(tmp_path / "ray" / "ledger")}
    markers = sorted((tmp_path / "ray" / "trials").glob("*/result.json"))
    times = {path: path.stat().st_mtime_ns for path in markers}
    again = run(job(tmp_path / "ray", tune={"num_samples": 4}))
    assert points(again) == points(local)
    assert len(times) == 3 and all(path.stat().st_mtime_ns == t for path, t in times.items())
    assert before <= {r["key"] for r in read_ledger(tmp_path / "ray" / "ledger")}


def test_a_searcher_of_tune_proposes_and_is_told(tmp_path: Path) -> None:
    tune = {"num_samples": 3, "searcher": "tests.distributed.test_tuned_ray:make_searcher"}
    result = run(job(tmp_path, tune={**tune, "objectives": ["score", "macs"]}))
    assert [row.state for row in result.samples] == ["finished"] * 3
    for row in result.samples:
        assert row.settings["criterion"] in ("l1", "fpgm")
        assert 0.05 <= row.settings["sparsities.conv1"] <= 0.95


def test_hopeless_trials_are_stopped_by_their_curves(tmp_path: Path) -> None:
    pruner = {"type": "SimulatedAnnealing", "iterations": 6, "neighbours": 2, "recalibrate": 0}
    sweep = job(
        tmp_path,
        pruners=[{**pruner, "criterion": name} for name in ("l2", "random", "fpgm")],
        tune={"scheduler": "asha", "grace": 1, "factor": 3},
        budgets=[{"params": "40%"}],
    )
    result = run(sweep)
    stopped = [trial for trial in result.trials if trial.stopped is not None]
    assert stopped and len(stopped) < 3
    for trial in stopped:
        assert trial.rows == () and len(trial.curve) == trial.stopped + 1
        marker = json.loads((tmp_path / "trials" / trial.name / "result.json").read_text())
        assert marker["stopped"] == trial.stopped
        assert marker["score"] == trial.curve[-1].best_score
    before = read_ledger(tmp_path / "ledger")
    again = run(sweep)
    assert [t.stopped for t in again.trials] == [t.stopped for t in result.trials]
    assert read_ledger(tmp_path / "ledger") == before


def test_what_fails_on_replicas_ends_as_failed_and_the_rest_goes_on(tmp_path: Path) -> None:
    result = run(
        job(
            tmp_path,
            concurrent=None,
            task="tests.failing_tasks:FailingTask",
            task_args={"how": "nan loss", "below": 7},
            pruners=[
                {"type": "L2Filter"},  # fails: it leaves 6 of conv1's 8 channels
                {"type": "NetAdapt", "iterations": 2, "epochs": 0.25},
                {"type": "SimulatedAnnealing", "iterations": 3, "recalibrate": 0},
            ],
            tune=None,
            budgets=[{"params": "60%"}],
        )
    )
    one_shot, net_adapt, annealing = result.trials
    assert "score and loss must be finite" in one_shot.failure and one_shot.rows == ()
    for trial in (net_adapt, annealing):
        assert trial.failure is None and trial.budget_met
        assert sum(step.failed for step in trial.curve) > 0
        assert dict((name, kept) for name, kept, _ in trial.counts)["conv1"] >= 7


def test_all_samples_failing_on_replicas_is_one_error(tmp_path: Path) -> None:
    bad = job(
        tmp_path,
        concurrent=None,
        task="tests.failing_tasks:FailingTask",
        task_args={"how": "out of memory", "below": 8},
        budgets=[{"macs": "30%"}],
    )
    with pytest.raises(EvaluationError, match=r"^all 3 samples failed: .*OutOfMemoryError: CUDA"):
        run(bad)
