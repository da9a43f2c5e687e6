"""What ends Tune without an answer: a trial's process killed for lack of memory, a full disk."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray

from raycompress.distributed.searcher import GivenOut
from raycompress.distributed.spec import TrialSpec
from raycompress.distributed.tune import _whatever_memory
from raycompress.distributed.watching import FULL, MAX_RETRIES, full_disk
from raycompress.errors import EvaluationError


def killed() -> RuntimeError:
    """What Tune makes of it."""
    error = RuntimeError("Caught unexpected exception: 1 worker(s) were killed")
    error.__cause__ = ray.exceptions.OutOfMemoryError("1 worker(s) were killed")
    return error


class Fits:
    """Runs of Tune: each takes steps, then is killed, or ends."""

    def __init__(self, *steps: int) -> None:
        self.watch = SimpleNamespace(num_steps=0)
        self.steps: Iterator[int] = iter(steps)

    def __call__(self) -> str:
        try:
            self.watch.num_steps += next(self.steps)
        except StopIteration:
            return "grid"
        raise killed()


def test_trials_start_again_while_they_come_further() -> None:
    fits = Fits(*[1] * (MAX_RETRIES + 3))
    assert _whatever_memory(fits, fits.watch, None) == "grid"
    assert fits.watch.num_steps == MAX_RETRIES + 3
    fits = Fits(*[1, *[0] * (MAX_RETRIES - 1)])
    assert _whatever_memory(fits, fits.watch, None) == "grid"


def test_trials_that_come_no_further_end_with_what_to_do() -> None:
    fits = Fits(*[0] * 9)
    with pytest.raises(EvaluationError) as caught:
        _whatever_memory(fits, fits.watch, None)
    text = str(caught.value)
    assert text.startswith(f"a trial was lost {MAX_RETRIES + 1} times without a new step: its ")
    assert "lack of memory; give each replica more memory" in text


def test_other_errors_of_tune_are_raised() -> None:
    def fit() -> None:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        _whatever_memory(fit, SimpleNamespace(num_steps=0), None)


def test_samples_that_were_running_are_given_out_once_more() -> None:
    specs = iter([TrialSpec(name, {"n": name}) for name in "abc"])
    ended: list[str] = []
    given = GivenOut(lambda: next(specs, None), ended.append)
    assert [given.suggest(i)["name"] for i in ("1", "2")] == ["a", "b"]
    given.on_trial_complete("1")
    given.start_again()
    assert [given.suggest(i)["name"] for i in ("3", "4")] == ["b", "c"]
    assert given.suggest("5") == "FINISHED"
    for trial in ("3", "4"):
        given.on_trial_complete(trial)
    assert ended == ["a", "b", "c"]


def test_the_first_trial_without_space_stops_them_all() -> None:
    disk = full_disk()
    assert not disk("a", {"step": 1}) and not disk.stop_all() and disk.reason is None
    assert disk("a", {FULL: "no space left to write x"}) and disk.stop_all()
    assert disk("b", {FULL: "no space left to write y"}) and not disk("c", {"step": 2})
    assert disk.reason == "no space left to write x"
