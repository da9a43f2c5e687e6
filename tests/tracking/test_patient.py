"""Logging while the tracking store is away: nothing waits for it, nothing is lost."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from raycompress.errors import TrackingError
from raycompress.tracking import patient
from raycompress.tracking.base import Refused
from raycompress.tracking.patient import PatientTracker


class Store:
    """Keeps calls as (run, what, value); away or refusing when told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.away = False
        self.refuses = ""
        self.hold = threading.Event()
        self.hold.set()

    def probe(self) -> None:
        if self.away:
            raise TrackingError("the store is away")


class Run:
    """A run of it."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.children: dict[str, Run] = {}
        self._call("made")

    def _call(self, what: str, *values: Any) -> None:
        self.store.hold.wait(10)
        self.store.probe()
        if what == self.store.refuses:
            raise Refused(f"the store refuses {what}")
        self.store.calls.append((self.name, what, *values))

    run_id = property(lambda self: f"id of {self.name}")

    def child(self, name: str) -> Run:
        if name not in self.children:
            self.children[name] = Run(self.store, name)
        return self.children[name]

    def log_params(self, params: Any) -> None:
        self._call("params", params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._call("metrics", metrics)

    def log_curve(self, points: Any) -> None:
        self._call("curve", [(step, metrics) for step, _, metrics in points])

    def log_artifact(self, path: Any, folder: str = "") -> None:
        self._call("artifact", path)

    def describe(self, text: str) -> None:
        self._call("describe", text)

    def log_model(self, model: Any, example_inputs: Any, registered_name: Any = None) -> str:
        self._call("model")
        return "models:/m"

    def finish(self, status: str) -> None:
        self._call("finish", status)


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(patient, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(patient, "STOP_SECONDS", 0.3)
    store, told = Store(), []
    tracker = PatientTracker.of(Run(store, "job"), store.probe, told.append, wait=0.3)
    return tracker, store, told


def made(store, name):
    return [call[1:] for call in store.calls if call[0] == name]


def test_what_was_logged_while_the_store_was_away_is_logged_when_it_is_back(job):
    tracker, store, told = job
    tracker.log_params({"seed": 1})
    trial = tracker.child("trial")
    trial.log_metrics({"loss": 3.0}, 0)
    tracker._writer.flush()
    store.away = True
    start = time.monotonic()
    for step in (1, 2, 3):
        trial.log_metrics({"loss": 3.0 - step}, step)
    trial.log_metrics({"size": 1.0})
    trial.log_metrics({"loss": -1.0}, 4)
    trial.finish("FINISHED")
    assert time.monotonic() - start < 0.05, "logging waits for nobody"
    time.sleep(0.2)
    assert len(told) == 1 and "the job goes on" in told[0]
    store.away = False
    tracker.finish("FINISHED")
    assert made(store, "job") == [
        ("made",),
        ("params", {"seed": 1}),
        ("finish", "FINISHED"),
    ]
    curves = [point for what, *value in made(store, "trial") if what == "curve" for point in value]
    assert [step for points in curves for step, _ in points] == [0, 1, 2, 3, 4]
    assert made(store, "trial")[0] == ("made",)
    assert made(store, "trial")[-3:] == [
        ("metrics", {"size": 1.0}),
        ("curve", [(4, {"loss": -1.0})]),
        ("finish", "FINISHED"),
    ]
    assert len(told) == 2 and "is back" in told[1]


def test_steps_that_wait_go_together_and_runs_stay_apart(job):
    tracker, store, _ = job
    one, two = tracker.child("one"), tracker.child("two")
    tracker._writer.flush()
    store.hold.clear()  # the store takes its time
    one.log_metrics({"loss": 0.0}, 0)
    time.sleep(0.1)
    for step in range(1, 50):
        one.log_metrics({"loss": step}, step)
        two.log_metrics({"loss": -step}, step)
    store.hold.set()
    tracker._writer.flush()
    curves = [call for call in store.calls if call[1] == "curve"]
    assert [(run, len(points)) for run, _, points in curves] == [
        ("one", 1),
        ("one", 49),
        ("two", 49),
    ]


def test_models_and_the_end_wait_for_the_store_but_not_for_ever(job):
    tracker, store, _ = job
    tracker.log_params({"seed": 1})
    tracker._writer.flush()
    store.away = True
    back = threading.Timer(0.15, lambda: setattr(store, "away", False))
    back.start()
    assert tracker.log_model(None, ()) == "models:/m"
    back.join()
    store.away = True
    tracker.log_params({"late": 1})
    for call in (lambda: tracker.log_model(None, ()), lambda: tracker.finish("FINISHED")):
        start = time.monotonic()
        with pytest.raises(TrackingError, match="is away"):
            call()
        assert 0.3 <= time.monotonic() - start < 1.0
    assert ("params", {"late": 1}) not in made(store, "job")


def test_a_slow_store_is_not_away(job):
    tracker, store, _ = job
    store.hold.clear()
    threading.Timer(0.6, store.hold.set).start()  # twice what it would wait for one that is away
    tracker.log_params({"seed": 1})
    tracker.finish("FINISHED")
    assert made(store, "job")[-1] == ("finish", "FINISHED")


def test_a_store_that_never_answers_holds_up_no_end(job):
    tracker, store, _ = job
    store.hold.clear()
    tracker.log_params({"seed": 1})
    with pytest.raises(TrackingError, match=r"it didn't answer within 0\.3 s"):
        tracker.finish("FAILED")
    store.hold.set()


def test_what_the_store_refuses_holds_up_nothing_and_is_told_at_the_end(job):
    tracker, store, told = job
    store.refuses = "params"
    tracker.log_params({"seed": 1})
    tracker.log_metrics({"loss": 1.0}, 0)
    with pytest.raises(Refused, match="refuses params"):
        tracker.finish("FINISHED")
    assert [what for what, *_ in made(store, "job")] == ["made", "curve", "finish"]
    assert told == ["the store refuses params; the job goes on"]
    store.refuses = "model"
    with pytest.raises(Refused, match="refuses model"):
        tracker.log_model(None, ())


def test_a_stopped_job_tells_its_state_and_leaves_the_rest_to_its_continuation(job):
    tracker, store, _ = job
    tracker._writer.flush()
    store.hold.clear()
    tracker.log_params({"seed": 1})  # under way when the signal comes
    time.sleep(0.1)
    tracker.log_metrics({"loss": 1.0}, 0)
    store.hold.set()
    tracker.finish("KILLED")
    assert [what for what, *_ in made(store, "job")] == ["made", "params", "finish"]


def test_a_mistake_of_ours_is_raised_where_the_job_is(job):
    tracker, _, _ = job
    tracker.log_metrics({"loss": 1.0}, 0)
    tracker._later(lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tracker.finish("FINISHED")
    with pytest.raises(ZeroDivisionError):
        tracker.log_params({})
