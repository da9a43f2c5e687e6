"""Jobs that are disturbed, what is compared of them, and what MLflow says of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow

from raycompress.results import JobResult

TASK = "tests.distributed.chaos_task:ChaosTask"
REPLICAS = 2
ANNEALING = {"type": "SimulatedAnnealing", "iterations": 6, "neighbours": 3, "recalibrate": 1}
NET_ADAPT = {"type": "NetAdapt", "iterations": 4, "epochs": 0.7}
CURVES = {"type": "CurveSolver", "iterations": 3}
JOBS: dict[str, dict[str, Any]] = {
    "annealing": {"pruners": [{**ANNEALING, "chains": 2}]},
    "net-adapt": {"pruners": [NET_ADAPT]},
    "curves": {"pruners": [CURVES]},
    "two trials": {"pruners": [ANNEALING, NET_ADAPT]},
    "study": {
        "pruners": [{**ANNEALING, "criterion": {"choice": ["l1", "l2", "fpgm"]}}],
        "tune": {"num_samples": 3},
    },
}


def job(name: str, output: Path, seconds: float = 0.0, **cluster: Any) -> dict[str, Any]:
    return {
        "name": "chaos",
        "task": TASK,
        "task_args": {"log": f"{output}.log", "seconds": seconds},
        "budgets": [{"params": "40%"}],
        "latency": {"batch_sizes": [1], "repeats": 1},
        "recover": {"epochs": 0.5},
        "cluster": {"replicas": REPLICAS, "cpus": 0.5, "start_timeout": 300.0, **cluster},
        "tracking": {"uri": "none"},
        "output": str(output),
        **JOBS[name],
    }


def told(result: JobResult) -> Any:
    """What must not depend on what happened."""
    trials = [
        (
            *(trial.name, trial.counts, trial.weights, trial.failure, trial.curve, trial.dfe),
            [(row.name, row.score_validation, row.score_test) for row in trial.rows],
        )
        for trial in result.trials
    ]
    samples = [(row.name, row.settings, row.state, row.score, row.loss) for row in result.samples]
    return result.best, trials, sorted(samples, key=lambda row: row[0])


def states(output: Path) -> list[str]:
    """Of the runs in a job's own MLflow store; each step of a curve is there once."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    for found in runs:
        steps = [m.step for m in client.get_metric_history(found.info.run_id, "best_loss")]
        assert steps == list(range(len(steps)))
    return [found.info.status for found in runs]


def store(output: Path, migrated: Path) -> None:
    """Puts a job's MLflow store, which takes seconds to make, there before anything is timed."""
    output.mkdir()
    shutil.copy(migrated, output / "mlflow.db")
