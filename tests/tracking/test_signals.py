"""Ctrl-C and SIGTERM, once and again, wherever a job is: its end is told, without tracebacks."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import raycompress.distributed.jobs
import raycompress.driver
from raycompress import run
from raycompress.cli import app
from raycompress.errors import InterruptedJob, TrackingError
from raycompress.ledger import read_ledger
from raycompress.output import lock
from raycompress.progress import SilentProgress
from raycompress.signals import held, ignored, terminable
from raycompress.tracking import patient
from raycompress.tracking.base import NoTracker, Status
from raycompress.tracking.patient import PatientTracker
from tests.distributed.chaos import alive, events, send
from tests.distributed.chaos_jobs import ANNEALING, states
from tests.distributed.chaos_jobs import job as slow_job
from tests.distributed.chaos_jobs import store as make_store

ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def ask(number: signal.Signals, times: int = 1) -> None:
    """Each has been handled when this returns, where the main thread calls it."""
    for _ in range(times):
        os.kill(os.getpid(), number)


class Store(NoTracker):
    """Of one run; keeps the states that it ends in."""

    def __init__(self) -> None:
        self.states: list[Status] = []
        self.away = False
        self.at_finish: Callable[[], object] = lambda: None

    def probe(self) -> None:
        if self.away:
            raise TrackingError("the store is away")

    def finish(self, status: Status) -> None:
        self.probe()
        self.at_finish()
        self.states.append(status)


class Stopping(SilentProgress):
    """Asks a job to stop after so many of its search's steps."""

    def __init__(self, number: signal.Signals, after: int = 1) -> None:
        self.number, self.left = number, after
        self.messages: list[str] = []

    def step(self, text: str, *rest: Any) -> None:
        if ": best loss" in text:
            self.left -= 1
            if self.left == 0:
                ask(self.number)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "asked",
        "task": "raycompress.testing:ToyTask",
        "pruners": [{"type": "SimulatedAnnealing", "iterations": 4, "neighbours": 2}],
        "budgets": [{"macs": "60%"}],
        "latency": {"batch_sizes": [1], "repeats": 1},
        "cluster": {"executor": "local"},
        "output": str(tmp_path / "out"),
    }


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()

    def open_tracker(plan: Any, key: str, tell: Callable[[str], None]) -> PatientTracker:
        return PatientTracker.of(found, found.probe, tell, 1.0)

    monkeypatch.setattr(raycompress.driver, "open_tracker", open_tracker)
    return found


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A job leaves a process's handlers as they were."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@BOTH
def test_signals_while_the_end_is_told_do_not_cut_it_short(
    number: signal.Signals, job: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    def impatient() -> None:  # in the thread that writes; the job's own waits for it
        ask(signal.SIGINT)
        ask(signal.SIGTERM)
        time.sleep(0.2)

    store.at_finish = impatient
    with pytest.raises(InterruptedJob, match=r"stopped; .* the same command continues"):
        run(job, progress=Stopping(number))
    assert store.states == ["KILLED"]
    if number is signal.SIGTERM:
        return  # it goes on in the same way
    done = {record["key"] for record in read_ledger(tmp_path / "out" / "ledger")}
    store.at_finish = lambda: None
    result = run(job)
    assert store.states[0] == "KILLED" and set(store.states[1:]) == {"FINISHED"}
    records = [record["key"] for record in read_ledger(tmp_path / "out" / "ledger")]
    assert done and done < set(records) and len(records) == len(set(records))
    assert result.trials[0].replayed > 0


def test_a_store_that_is_away_is_given_up_on_and_the_message_says_what_comes(
    job: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "STOP_SECONDS", 0.3)
    monkeypatch.setattr(patient, "RETRY_SECONDS", 0.05)
    store.away = True
    progress = Stopping(signal.SIGINT)
    impatient = threading.Timer(0.0, ask, (signal.SIGTERM,))
    monkeypatch.setattr(store, "probe", _first(impatient.start, store.probe))
    start = time.monotonic()
    with pytest.raises(InterruptedJob):
        run(job, progress=progress)
    impatient.join()
    assert time.monotonic() - start < 20 and store.states == []
    assert (
        "the store is away; its run may stand there as RUNNING until the job continues"
        in progress.messages
    )


def _first(once: Callable[[], object], then: Callable[[], None]) -> Callable[[], None]:
    left = [once]

    def call() -> None:
        if left:
            left.pop()()
        then()

    return call


@BOTH
def test_a_signal_while_the_store_is_opened_leaves_no_run_that_nobody_ends(
    number: signal.Signals, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, opened = Store(), []

    def open_tracker(*_: Any) -> Store:
        ask(number)
        opened.append("the run is made")
        return store

    monkeypatch.setattr(raycompress.driver, "open_tracker", open_tracker)
    with pytest.raises(InterruptedJob):
        run(job)
    assert opened and store.states == ["KILLED"]


@BOTH
def test_a_second_signal_while_the_cluster_is_left_has_its_own_message(
    number: signal.Signals,
    job: dict[str, Any],
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = []

    def backend_of(plan: Any, progress: Any, stack: Any) -> Any:
        stack.callback(lambda: left.append("before"))
        stack.callback(lambda: (ask(number), left.append("never")))
        return backend(plan, progress, stack)

    backend = raycompress.driver.backend_of
    monkeypatch.setattr(raycompress.driver, "backend_of", backend_of)
    with pytest.raises(InterruptedJob):
        run(job, progress=Stopping(number))
    assert left == ["before"] and store.states == ["KILLED"]
    with lock(tmp_path / "out"):
        pass  # the output was let go


def test_what_is_held_ends_first_and_a_second_signal_ends_it() -> None:
    done = []
    with terminable(), pytest.raises(KeyboardInterrupt), held():
        ask(signal.SIGTERM)
        done.append("whole")
    with terminable(), pytest.raises(KeyboardInterrupt), held():
        ask(signal.SIGINT)
        done.append("begun")
        ask(signal.SIGTERM)
        done.append("never")
    with ignored():
        ask(signal.SIGTERM, 2)
        ask(signal.SIGINT, 2)
    assert done == ["whole", "begun"]
    thread = threading.Thread(target=lambda: _in_all(done))
    thread.start()
    thread.join()
    assert done == ["whole", "begun", "in a thread"]


def _in_all(done: list[str]) -> None:
    with terminable(), held(), ignored():
        done.append("in a thread")


def test_ctrl_c_leaves_a_submitted_job_running(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        def __init__(self, address: str) -> None:
            self.address = address

        def latest(self, name: str) -> Any:
            return raycompress.distributed.jobs.Run(
                **{field: None for field in raycompress.distributed.jobs.Run.__annotations__}
                | {"id": f"{name}-1", "name": name}
            )

        def follow(self, found: Any, write: Callable[[str], None]) -> Any:
            ask(signal.SIGINT)

    monkeypatch.setattr(raycompress.distributed.jobs, "JobServer", Server)
    done = CliRunner().invoke(app, ["status", "small", "--follow"])
    assert done.exit_code == 130
    assert done.stderr.startswith("error: small-1 goes on; raycompress status small --follow")


def use_store(job: dict[str, Any], migrated: Path) -> None:
    """The job's own MLflow store, made before."""
    del job["tracking"]
    make_store(Path(job["output"]), migrated)


def start(job: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    file = Path(f"{job['output']}.yaml")
    file.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "raycompress", "run", str(file), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_process_exits_with_1_or_2_and_one_line(job: dict[str, Any]) -> None:
    failing = job | {
        "task": "tests.failing_tasks:FailingTask",
        "task_args": {"how": "raise", "below": 8},
        "pruners": [{"type": "L1Filter", "sparsity": 0.5}],
        "budgets": [],
        "tracking": {"uri": "none"},
    }
    for arguments, code, text in (
        (("--quiet",), 1, "no score for such a small model"),
        (("--quiet", "--set", "seed=x"), 2, "seed"),
    ):
        process = start(failing, *arguments)
        _, err = process.communicate(timeout=100)
        assert (process.returncode, err.count("\n")) == (code, 1), err
        assert err.startswith("error: ") and text in err


def wait_for_work(job: dict[str, Any], process: subprocess.Popen[str], num: int) -> None:
    """Until that many more units have begun."""
    log = Path(job["task_args"]["log"])
    num += len(events(log))
    while len(events(log)) < num:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def hammer(process: subprocess.Popen[str], *numbers: signal.Signals) -> str:
    """Asks again and again until the process has ended; what it said."""
    for number in itertools.cycle(numbers):
        if process.poll() is not None:
            break
        process.send_signal(number)
        time.sleep(0.1)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 75, (process.returncode, err)
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return err


@pytest.mark.slow
def test_a_process_that_is_asked_again_and_again_tells_its_end(
    tmp_path: Path, migrated: Path
) -> None:
    job = slow_job("annealing", tmp_path / "out", 0.02, executor="local")
    use_store(job, migrated)
    process = start(job)
    wait_for_work(job, process, 20)
    begun = time.monotonic()
    err = hammer(process, signal.SIGTERM, signal.SIGINT)
    assert time.monotonic() - begun < 15 and "the same command continues" in err
    assert states(tmp_path / "out") == ["KILLED", "KILLED"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_ray_a_replica_that_dies_meanwhile_and_another_signal_change_nothing(
    tmp_path: Path, migrated: Path
) -> None:
    job = slow_job("annealing", tmp_path / "out", 0.02)
    job["pruners"] = [{**ANNEALING, "iterations": 60}]
    use_store(job, migrated)
    process = start(job)
    wait_for_work(job, process, 20)
    hosts = {event.pid for event in events(Path(job["task_args"]["log"]))}
    process.send_signal(signal.SIGINT)
    killed = [pid for pid in hosts if alive(pid)][:1]
    send(killed, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert killed and process.returncode == 75, err
    assert "the same command continues" in err and "Traceback" not in err
    assert states(tmp_path / "out") == ["KILLED", "KILLED"]
    before = len(read_ledger(tmp_path / "out" / "ledger"))

    process = start(job)
    wait_for_work(job, process, 20)
    process.send_signal(signal.SIGTERM)
    # The second ones are no SIGTERM: while Ray ends, that kills a process whatever its handler.
    err = hammer(process, signal.SIGINT)
    assert f"Continues: {before} finished units" in err
    assert states(tmp_path / "out") == ["KILLED", "KILLED"]
    records = [record["key"] for record in read_ledger(tmp_path / "out" / "ledger")]
    assert before < len(records) == len(set(records))
