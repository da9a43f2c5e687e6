"""What stands beside Tune's own loop: who listens to trials, and what ends the loop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from raycompress.config import ClusterConfig
from raycompress.distributed.cluster import bundle, check_feasible

__all__ = [
    "FULL",
    "MAX_RETRIES",
    "OnReport",
    "check_room",
    "full_disk",
    "name_of",
    "overseer",
    "quiet",
    "stopping",
    "watching",
]

MAX_RETRIES = 2
"""Restarts of a trial whose process was lost or raised, without a new step in between.

Replay makes them cheap, and a trial that comes further each time may lose any number of nodes.
"""

FULL = "no space left"
"""Key under which a trial reports that it can't write any more, with the reason."""

OnReport = Callable[[str, int, Mapping[str, float]], bool | None]
"""Called with (trial, step, metrics); True: the trial is to stop."""


def check_room(cluster: ClusterConfig, timeout: float) -> None:
    """Raises a ClusterError if a trial can't fit the cluster's nodes, busy or not, nor new ones."""
    replicas = [bundle(cluster)] * cluster.replicas
    what = f"a trial with {cluster.replicas} replicas doesn't fit"
    check_feasible(replicas, what, timeout)


def name_of(trial: Any) -> str:
    """Of a trial, as the job has it."""
    name: str = trial.config["name"]
    return name


def watching(on_report: OnReport | None) -> Any:
    """The scheduler; see the class."""
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class Watch(FIFOScheduler):
        """First come, first served; forwards what trials report, and stops those that are to stop.

        Replayed steps were forwarded before.
        """

        def __init__(self) -> None:
            super().__init__()
            self.last: dict[str, int] = {}
            self.stopped: set[str] = set()
            self.ended: set[str] = set()
            self.num_steps = 0

        def __reduce__(self) -> tuple[Any, ...]:
            # Tune pickles it into a snapshot that is never read here; what the driver listens with
            # (a tracker, a terminal) can't be pickled.
            return (FIFOScheduler, ())

        def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
            return self

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            name, step = name_of(trial), result.get("step")
            if step is None or step <= self.last.get(name, -1):
                return str(TrialScheduler.CONTINUE)
            self.last[name] = step
            self.num_steps += 1
            trial.max_failures = trial.num_failures + MAX_RETRIES
            metrics = {key: result[key] for key in result["reported"]}
            if on_report is not None and on_report(name, step, metrics):
                self.stopped.add(name)
                self.ended.add(name)
                return str(TrialScheduler.STOP)
            return str(TrialScheduler.CONTINUE)

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(controller, trial, result)
            self.ended.add(name_of(trial))

    return Watch()


def full_disk() -> Any:
    """What stops all trials once one can't write, for the others would meet it too."""
    from ray import tune

    class FullDisk(tune.Stopper):
        """Its `reason` is what the first of them reported; None: there is room."""

        def __init__(self) -> None:
            self.reason: str | None = None

        def __reduce__(self) -> tuple[Any, ...]:
            return (tune.stopper.NoopStopper, ())

        def __deepcopy__(self, memo: dict[int, Any]) -> FullDisk:
            return self

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            self.reason = self.reason or result.get(FULL)
            return FULL in result

        def stop_all(self) -> bool:
            return self.reason is not None

    return FullDisk()


def overseer(stopped: threading.Event, cluster: ClusterConfig) -> Any:
    """The callback; see the class."""
    from ray import tune

    class Overseer(tune.Callback):
        """Looks, at each of Tune's steps, for what Tune itself would never end at.

        A signal that came before Tune's handler stood; and trials that wait for nodes which are
        gone: Tune waits for ever.
        """

        def __init__(self) -> None:
            self.idle_since: float | None = None

        def __reduce__(self) -> tuple[Any, ...]:
            return (tune.Callback, ())  # an event can't be pickled

        def __deepcopy__(self, memo: dict[int, Any]) -> Overseer:
            return self

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if stopped.is_set():
                os.kill(os.getpid(), signal.SIGUSR1)
            states = {trial.status for trial in trials}
            if "RUNNING" in states or "PENDING" not in states:
                self.idle_since = None
                return
            now = time.monotonic()
            self.idle_since = self.idle_since or now
            if now - self.idle_since > cluster.start_timeout:
                check_room(cluster, 0.0)
                self.idle_since = now  # there is room, which others hold, or a process that starts

    return Overseer()


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Turns SIGINT and SIGTERM into Tune's own graceful stop, and remembers that they came."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt  # asked twice: at once
        stopped.set()
        os.kill(os.getpid(), signal.SIGUSR1)  # Tune's handler stands there while it runs

    kept = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # before Tune's handler is there
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def quiet() -> Iterator[None]:
    """Tune's own messages stay out of the terminal; failures reach the caller as errors."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
