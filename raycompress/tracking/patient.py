"""A tracker that outlives its store: what is logged waits while the store is away.

One thread writes, so that a job waits for its store only at the end. What still waits then isn't
lost: MLflow shows what the output folder holds, and the same command logs all of it again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from raycompress.errors import TrackingError
from raycompress.tracking.base import Point, Refused, Status, Tracker

__all__ = ["PatientTracker"]

T = TypeVar("T")

RETRY_SECONDS = 2.0
"""Between two looks whether the store is back."""
STOP_SECONDS = 10.0
"""How long a job that is stopped waits for its store."""


@dataclass(eq=False)
class _Call:
    """Something to log.

    Attributes:
        run: The tracker that it belongs to.
        make: Does it.
        points: Of a curve; more are added while the call waits.
    """

    run: PatientTracker
    make: Callable[[Tracker], object]
    points: list[Point] | None = None


class _Writer:
    """Makes calls in order, each until it succeeds or is refused.

    Attributes:
        away: Why the last call failed; None: it didn't.
        refused: Why the store would not take the first that it refused; None: it took all.
    """

    def __init__(
        self, probe: Callable[[], object], tell: Callable[[str], None], wait: float
    ) -> None:
        self._probe, self._tell, self.wait = probe, tell, wait
        self.away: TrackingError | None = None
        self.refused: TrackingError | None = None
        self._broken: BaseException | None = None
        self._calls: deque[_Call] = deque()
        self._running: _Call | None = None
        self._answered = time.monotonic()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, call: _Call) -> None:
        """Has a call made after those of the same run before it."""
        with self._changed:
            if self._broken is not None:
                raise self._broken
            last = next((c for c in reversed(self._calls) if c.run is call.run), None)
            if call.points and last is not None and last.points and last is not self._running:
                last.points += call.points
                return
            self._calls.append(call)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="raycompress-tracking", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def forget(self) -> None:
        """Drops what waits."""
        with self._changed:
            self._calls.clear()

    def flush(self, seconds: float | None = None) -> None:
        """Returns when all calls have been made.

        Args:
            seconds: To wait for each call; None: for one that is under way as long as MLflow waits,
                for a store that is away as long as the job says.

        Raises:
            TrackingError: It is still away.
        """
        start, limit = time.monotonic(), self.wait if seconds is None else seconds
        with self._changed:
            while (self._calls or self._running is not None) and self._broken is None:
                over = time.monotonic() - max(start, self._answered) > limit
                if over and (self.away is not None or seconds is not None):
                    raise self.away or TrackingError(f"it didn't answer within {limit:g} s")
                self._changed.wait(0.1)
            if self._broken is not None:
                raise self._broken

    def now(self, make: Callable[[], T]) -> T:
        """Makes a call in this thread, after all others.

        Raises:
            TrackingError: The store refuses it, or stays away.
        """
        self.flush()
        start = time.monotonic()
        while True:
            try:
                if self.away is not None:
                    self._probe()
                result = make()
            except Refused:
                raise
            except TrackingError as error:
                self._miss(error)
                if time.monotonic() - start > self.wait:
                    raise
                time.sleep(min(RETRY_SECONDS, self.wait))
            else:
                self._reach()
                return result

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._calls:
                    self._changed.wait()
                call = self._running = self._calls[0]
            done = False
            try:
                if self.away is not None:
                    self._probe()
                call.make(call.run.inner())
                done = True
            except Refused as error:
                if self.refused is None:
                    self._tell(f"{error}; the job goes on")
                    self.refused = error
                done = True
            except TrackingError as error:
                self._miss(error)
            except BaseException as error:  # a mistake of ours: the job's thread raises it
                with self._changed:
                    self._broken, self._running = error, None
                    self._changed.notify_all()
                return
            with self._changed:
                self._running = None
                if done:
                    if self._calls and self._calls[0] is call:
                        self._calls.popleft()
                    self._answered = time.monotonic()
                self._changed.notify_all()
            if done:
                self._reach()
            else:
                time.sleep(RETRY_SECONDS)

    def _miss(self, error: TrackingError) -> None:
        if self.away is None:
            self._tell(f"{error}; the job goes on, and what is to be logged waits")
        self.away = error

    def _reach(self) -> None:
        if self.away is not None:
            self.away = None
            self._tell("the tracking store is back; what waited is being logged")


class PatientTracker:
    """Passes on to a tracker what it is told, when that is there; see `Tracker`.

    Logging never raises and never waits. `run_id`, `log_model` and a job's `finish` come after all
    that was logged before, and wait for a store that is away.

    Args:
        inner: The tracker of the store; called in the thread that writes.
        writer: Makes the calls.
        is_job: The run is the job's, not a trial's.
    """

    def __init__(self, inner: Callable[[], Tracker], writer: _Writer, *, is_job: bool) -> None:
        self.inner, self._writer, self._is_job = inner, writer, is_job
        self._children: dict[str, PatientTracker] = {}

    @staticmethod
    def of(
        tracker: Tracker,
        probe: Callable[[], object],
        tell: Callable[[str], None],
        wait: float,
    ) -> PatientTracker:
        """A job's tracker.

        Args:
            tracker: Of the store.
            probe: Raises a TrackingError, within seconds, if the store is away.
            tell: Told when the store goes away, when it is back, and what it refuses.
            wait: Seconds to wait at the end for a store that is away.
        """
        return PatientTracker(lambda: tracker, _Writer(probe, tell, wait), is_job=True)

    @property
    def run_id(self) -> str:
        """Of the run in the store.

        Raises:
            TrackingError: The store refuses it, or stays away.
        """
        return self._writer.now(lambda: self.inner().run_id)

    def child(self, name: str) -> PatientTracker:
        """The child run of a trial."""
        if name not in self._children:
            child = PatientTracker(lambda: self.inner().child(name), self._writer, is_job=False)
            self._children[name] = child
            child._later(lambda run: None)  # it is made
        return self._children[name]

    def log_params(self, params: Mapping[str, str | int | float | bool | None]) -> None:
        """Settings."""
        self._later(lambda run: run.log_params(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Figures; the time of a step is now, whenever the store takes it."""
        if step is None:
            self._later(lambda run: run.log_metrics(metrics))
        else:
            self.log_curve([(step, time.time(), metrics)])

    def log_curve(self, points: Sequence[Point]) -> None:
        """Steps of a curve; those that wait go to the store at once."""
        waiting = list(points)
        self._writer.add(_Call(self, lambda run: run.log_curve(waiting), waiting))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder of files."""
        self._later(lambda run: run.log_artifact(path, folder))

    def describe(self, text: str) -> None:
        """A description in Markdown."""
        self._later(lambda run: run.describe(text))

    def log_model(
        self, model: nn.Module, example_inputs: tuple[Any, ...], registered_name: str | None = None
    ) -> str:
        """The model; returns its URI.

        Raises:
            TrackingError: The store refuses it, or stays away.
        """
        return self._writer.now(
            lambda: self.inner().log_model(model, example_inputs, registered_name)
        )

    def log_onnx(
        self,
        path: Path,
        example_inputs: tuple[Any, ...],
        weights: str,
        registered_name: str | None = None,
    ) -> str:
        """An ONNX file as a model; returns its URI.

        Raises:
            TrackingError: The store refuses it, or stays away.
        """
        return self._writer.now(
            lambda: self.inner().log_onnx(path, example_inputs, weights, registered_name)
        )

    def finish(self, status: Status) -> None:
        """Ends the run in a true state; a job's, when all that waits has been logged.

        A job that was stopped drops what waits: when it is continued, it logs it again.

        Raises:
            TrackingError: Of a job's: the store has refused something, or stays away.
        """
        if self._is_job and status == "KILLED":
            self._writer.forget()
        self._later(lambda run: run.finish(status))
        if self._is_job:
            self._writer.flush(None if status == "FINISHED" else STOP_SECONDS)
            if self._writer.refused is not None:
                raise self._writer.refused

    def _later(self, make: Callable[[Tracker], object]) -> None:
        self._writer.add(_Call(self, make))
