"""Two jobs at once on one cluster and one MLflow store, which doesn't exist before."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
import yaml

from raycompress.driver import run
from raycompress.results import JobResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parent.parent.parent
JOB: dict[str, Any] = {
    "name": "both",
    "task": "raycompress.testing:ToyTask",
    "pruners": [{"type": "SimulatedAnnealing", "iterations": 8}],
    "budgets": [{"macs": "50%"}],
    "latency": {"batch_sizes": [1], "repeats": 1},
    # More than half of the cluster each: they take turns.
    "cluster": {"replicas": 2, "cpus": 1, "start_timeout": 100.0},
}


def told(result: JobResult) -> Any:
    """What must not depend on another job."""
    return result.best, [
        (t.name, t.counts, t.weights, t.curve, t.dfe, [(r.name, r.score_test) for r in t.rows])
        for t in result.trials
    ]


def test_each_is_as_if_it_were_alone(tmp_path: Path) -> None:
    local = {"executor": "local"}
    alone = run(
        {**JOB, "cluster": local, "tracking": {"uri": "none"}, "output": str(tmp_path / "alone")}
    )
    names = ("one", "two")  # the same job, to the letter
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        drivers = {}
        for name in names:
            uri = f"sqlite:///{tmp_path}/mlflow.db"
            job = {**JOB, "output": str(tmp_path / name), "tracking": {"uri": uri}}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(job))
            drivers[name] = subprocess.Popen(
                [sys.executable, "-m", "raycompress", "run", str(tmp_path / f"{name}.yaml")],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        for name, driver in drivers.items():
            printed, _ = driver.communicate(timeout=250)
            assert driver.returncode == 0, f"{name}: {printed}"
        states = [each["state"] for each in ray.util.placement_group_table().values()]
        assert set(states) == {"REMOVED"} and len(states) >= 2 * len(names)
        end = time.monotonic() + 30
        while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
            assert time.monotonic() < end, "something still runs"
            time.sleep(0.2)
    finally:
        ray.shutdown()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "both"]
    runs = {r.info.run_id: r for r in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 2 * len(names) and {r.info.status for r in runs.values()} == {"FINISHED"}
    seen = set()
    for name in names:
        result = JobResult.from_json((tmp_path / name / "results/summary.json").read_text())
        assert told(result) == told(alone)
        (trial,) = result.trials
        child = runs[trial.run_id].data
        assert child.tags["mlflow.parentRunId"] == result.run_id
        steps = [m.step for m in client.get_metric_history(trial.run_id, "best_loss")]
        assert steps == [point.step for point in trial.curve]
        seen |= {result.run_id, trial.run_id}
    assert seen == set(runs)
