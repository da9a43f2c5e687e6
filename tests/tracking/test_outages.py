"""Jobs whose MLflow server goes away: real servers, killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from raycompress.errors import TrackingError
from raycompress.ledger import read_ledger
from raycompress.results import JobResult
from raycompress.tracking.address import check
from raycompress.tracking.ui import ui_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parent.parent.parent
JOB = """\
name: outage
task: tests.tracking.slow_task:SlowTask
task_args: {width: 16}
pruners:
  - {type: SimulatedAnnealing, iterations: 60, neighbours: 4, recalibrate: 0}
budgets: [{params: 60%}]
latency: {batch_sizes: [1], repeats: 1}
cluster: {executor: local}
"""


class Server:
    """An MLflow server on loopback, with a SQLite store that outlives it."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder = folder
        folder.mkdir()
        shutil.copy(store, folder / "mlflow.db")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://me:secret@127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        command, environment = ui_command(self.folder, self.port)
        command += ["--artifacts-destination", str(self.folder / "served"), "--serve-artifacts"]
        command[command.index("--default-artifact-root") + 1] = "mlflow-artifacts:/"
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        while wait:
            try:
                return check(self.uri)
            except TrackingError:
                time.sleep(0.5)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def runs(self) -> dict[str, Any]:
        """All runs by name, read from the database."""
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")
        found = client.search_runs([e.experiment_id for e in client.search_experiments()])
        names = [run.info.run_name for run in found]
        assert len(set(names)) == len(names), "a run was made twice"
        return {run.info.run_name: run for run in found}

    def steps(self, run: Any, name: str) -> list[int]:
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")
        return [m.step for m in client.get_metric_history(run.info.run_id, name)]


@pytest.fixture
def server(tmp_path, migrated):
    found = Server(tmp_path / "server", migrated)
    found.start()
    yield found
    found.kill()


@pytest.fixture
def job(tmp_path, server):
    (tmp_path / "job.yaml").write_text(
        JOB + f"tracking: {{uri: '{server.uri}', wait: 5}}\noutput: {tmp_path}/out\n"
    )
    return tmp_path / "job.yaml"


def start(job, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "raycompress", "run", str(job), *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_units(job, num):
    folder = job.parent / "out/ledger"
    deadline = time.monotonic() + 120
    while not folder.exists() or len(read_ledger(folder)) < num:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return len(read_ledger(folder))


def summary(job):
    return JobResult.from_json((job.parent / "out/results/summary.json").read_text())


def check_complete(server, job):
    """Everything of the job is in the store, once."""
    runs, result = server.runs(), summary(job)
    (trial,) = result.trials
    own, child = runs["outage"], runs[trial.name]
    assert len(runs) == 2 and {r.info.status for r in runs.values()} == {"FINISHED"}
    assert (own.info.run_id, child.info.run_id) == (result.run_id, trial.run_id)
    assert server.steps(child, "best_loss") == [point.step for point in trial.curve]
    assert own.data.metrics["slim/macs"] == child.data.metrics["slim/macs"] == trial.rows[-1].macs
    assert child.data.params["pruner"] == "SimulatedAnnealing"
    served = server.folder / "served"
    for name in ("summary.json", "report.md", "candidates.parquet", "model.pt2", "pareto.png"):
        assert len(list(served.rglob(name))) == 1, name
    (kept,) = served.rglob("summary.json")
    assert json.loads(kept.read_text())["run_id"] == result.run_id
    written = [p for top in (job.parent / "out", server.folder) for p in top.rglob("*")]
    written = [p for p in written if p.is_file()]
    assert len(written) > 20 and not [p for p in written if b"me:secret" in p.read_bytes()]
    return result


def test_a_server_that_comes_back_gets_all(server, job):
    process = start(job)
    before = wait_for_units(job, 20)
    server.kill()
    during = wait_for_units(job, before + 30)  # the job goes on
    assert during < 100, "the search was nearly done: nothing is shown"
    server.start(wait=False)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "the job goes on, and what is to be logged waits" in err and "secret" not in out + err
    assert "the tracking store is back" in err and "Traceback" not in err
    check_complete(server, job)


def test_a_server_that_stays_away_leaves_the_results_and_the_same_command_logs_them(server, job):
    process = start(job)
    before = wait_for_units(job, 20)
    server.kill()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    folder = job.parent / "out"
    assert f"the job is done and its results are in {folder}/results" in err
    assert "the same command logs what is missing" in err and "secret" not in out + err
    first = summary(job)
    assert first.best and first.trials[0].rows and not first.run_id
    assert (folder / "results/report.md").exists()
    assert {r.info.status for r in server.runs().values()} == {"RUNNING"}  # nobody could tell it
    units = len(read_ledger(folder / "ledger"))
    assert units > before + 30
    server.start()
    again = start(job)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    result = check_complete(server, job)
    assert result.trials[0].counts == first.trials[0].counts
    assert len(read_ledger(folder / "ledger")) == units, "something was evaluated again"


def test_a_server_that_is_not_there_at_the_start_costs_nothing(server, job):
    server.kill()
    before = time.monotonic()
    process = start(job)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and time.monotonic() - before < 60
    assert f"no MLflow server answers at http://me:***@127.0.0.1:{server.port}" in err
    assert "secret" not in err and not (job.parent / "out/ledger").exists()


def test_a_job_that_is_stopped_while_the_server_is_away_says_so_and_goes_on_later(server, job):
    process = start(job)
    before = wait_for_units(job, 20)
    server.kill()
    wait_for_units(job, before + 10)
    process.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75 and time.monotonic() - stopped < 30
    assert "may stand there as RUNNING until the job continues" in err
    assert "the same command continues" in err
    server.start()
    again = start(job)
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    check_complete(server, job)
