from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Toy, wait_for
from ray_tasks import finished

from raycompress.config import ClusterConfig
from raycompress.distributed.tune import TrialSpec, run_samples, run_trials
from raycompress.errors import ClusterError
from raycompress.ledger import read_ledger

pytestmark = pytest.mark.usefixtures("cluster")
Few = Callable[..., ClusterConfig]
RUN = "ray_tasks:run_search_trial"


def trial(toy: Toy, name: str, counts: list[int], **options: Any) -> TrialSpec:
    folder = toy.folder / "ledger"
    folder.mkdir(exist_ok=True)
    return TrialSpec(name, {"ledger": str(folder), "part": name, "counts": counts, **options})


def shared(toy: Toy) -> dict[str, Any]:
    return {"ranking": toy.ranking, "weights": toy.digest}


def test_trials_report_in_order_and_are_not_run_twice(
    toy: Toy, few: Few, capfd: pytest.CaptureFixture[str]
) -> None:
    specs = [trial(toy, "one", [3, 5, 7, 9]), trial(toy, "two", [4, 6])]
    reports: list[tuple[str, int, Mapping[str, float]]] = []
    capfd.readouterr()
    results, _ = run_trials(
        specs,
        RUN,
        toy.spec(),
        few(2),
        toy.folder / "job",
        finished,
        on_report=lambda *report: reports.append(report),
        shared=shared(toy),
    )
    printed = "".join(capfd.readouterr())
    assert "trials" not in printed and "Tune" not in printed, printed
    for name, counts in (("one", [3, 5, 7, 9]), ("two", [4, 6])):
        expected = [t.score for t in toy.local().evaluate([toy.candidate(c) for c in counts])]
        assert results[name] == {"scores": expected, "num_evaluated": len(counts)}
        own = [(step, dict(metrics)) for trial, step, metrics in reports if trial == name]
        assert own == [
            (i, {"score": s, "count": float(c)})
            for i, (s, c) in enumerate(zip(expected, counts, strict=True))
        ]
    assert not (toy.folder / "job" / "tune" / "one.error.json").exists()

    start = time.monotonic()
    again = run_trials(
        specs, RUN, toy.spec(), few(2), toy.folder / "job", finished, shared=shared(toy)
    )
    assert again == (results, {}) and time.monotonic() - start < 1
    assert len(read_ledger(toy.folder / "ledger")) == 6


def test_a_killed_trial_replays_and_evaluates_nothing_twice(toy: Toy, few: Few) -> None:
    killed: list[int] = []

    def kill() -> None:
        pid = int(wait_for(toy.folder / "ledger" / "trial-pid").read_text())
        os.kill(pid, signal.SIGKILL)  # before its third step, for which it waits
        killed.append(pid)

    killer = threading.Thread(target=kill)
    steps: list[int] = []
    spec = trial(toy, "t", [3, 5, 7, 9], die=2)
    killer.start()
    results, _ = run_trials(
        [spec],
        RUN,
        toy.spec(),
        few(1),
        toy.folder / "job",
        finished,
        on_report=lambda name, step, metrics: steps.append(step),
        shared=shared(toy),
    )
    killer.join()
    assert killed
    assert steps == [0, 1, 2, 3]  # the replayed ones once
    assert results["t"]["num_evaluated"] == 2  # by the second process: 7 and 9
    records = read_ledger(toy.folder / "ledger")
    assert len(records) == len({record["key"] for record in records}) == 4


def test_a_failing_trial_says_why_and_the_others_finish(toy: Toy, few: Few) -> None:
    specs = [trial(toy, "bad", [3], fail=True), trial(toy, "good", [4])]
    results, failures = run_trials(
        specs, RUN, toy.spec(), few(1), toy.folder / "job", finished, shared=shared(toy)
    )
    assert failures == {"bad": "RuntimeError: the trial's own words"}
    assert results == {"good": finished(specs[1].payload)}
    assert results["good"]["num_evaluated"] == 1 and finished(specs[0].payload) is None


def test_what_cannot_fit_or_be_made_fails_at_once(toy: Toy, few: Few) -> None:
    specs = [trial(toy, "t", [3])]
    with pytest.raises(ClusterError, match=r"a trial with 40 replicas doesn't fit: they need 20"):
        run_trials(
            specs, RUN, toy.spec(), few(40), toy.folder / "job", finished, shared=shared(toy)
        )
    broken = toy.spec("ray_tasks:BrokenTask")
    _, failures = run_trials(
        specs, RUN, broken, few(1), toy.folder / "job", finished, shared=shared(toy)
    )
    assert failures["t"].startswith("TaskError: ") and "no data here" in failures["t"]


def test_trials_are_asked_for_one_by_one_told_and_stopped(toy: Toy, few: Few) -> None:
    specs = [trial(toy, "a", [3, 5, 7]), trial(toy, "b", [4], fail=True)]
    events: list[Any] = []

    def ask() -> TrialSpec | None:
        events.append("ask")
        return specs.pop(0) if specs else None

    def report(name: str, step: int, metrics: Mapping[str, float]) -> bool:
        events.append((name, step))
        return name == "a" and step == 1

    run_samples(
        ask,
        lambda name, result, failure: events.append((name, result, failure)),
        None,
        RUN,
        toy.spec(),
        few(1, max_concurrent=1),
        toy.folder / "job",
        finished,
        on_report=report,
        shared=shared(toy),
    )
    assert events == [
        *("ask", ("a", 0), ("a", 1), ("a", None, None)),
        *("ask", ("b", 0), ("b", None, "RuntimeError: the trial's own words"), "ask"),
    ]
    assert len(read_ledger(toy.folder / "ledger")) == 3  # a's last step never ran


@pytest.mark.slow
def test_signals_stop_the_trials_and_the_next_run_goes_on(toy: Toy, few: Few) -> None:
    spec = trial(toy, "t", [3, 5, 7], die=1)
    pid_file = toy.folder / "ledger" / "trial-pid"

    def interrupt(number: signal.Signals) -> None:
        wait_for(pid_file, 200.0)
        os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        thread = threading.Thread(target=interrupt, args=(number,))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_trials(
                [spec], RUN, toy.spec(), few(1), toy.folder / "job", finished, shared=shared(toy)
            )
        thread.join()
        assert signal.getsignal(number) is before
        pid = int(pid_file.read_text())
        end = time.monotonic() + 20
        while Path(f"/proc/{pid}/cmdline").exists() and b"ray::" in _cmdline(pid):
            assert time.monotonic() < end, "the trial's process is still there"
            time.sleep(0.1)
        assert len(read_ledger(toy.folder / "ledger")) == 1
        if number is signal.SIGINT:  # the next run gets as far, and stops there once more
            pid_file.unlink()
            (toy.folder / "ledger" / "died").unlink()
    results, _ = run_trials(
        [spec], RUN, toy.spec(), few(1), toy.folder / "job", finished, shared=shared(toy)
    )
    assert results["t"]["num_evaluated"] == 2  # 3 was in the ledger


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
