"""Whole jobs on Ray whose replicas hang or lack memory: once, and for as long as a cause lasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycompress.driver import run
from raycompress.errors import EvaluationError
from tests.distributed.chaos import records
from tests.distributed.chaos_jobs import ANNEALING, job, states, told

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def faulty(output: Path, faults: Path, pruner: dict[str, Any], **cluster: Any) -> dict[str, Any]:
    return {
        **job("annealing", output, **cluster),
        "task": "tests.distributed.faulty_task:FaultyTask",
        "task_args": {"folder": str(faults)},
        "pruners": [pruner],
    }


def test_a_hung_replica_and_two_without_memory_change_nothing(tmp_path: Path) -> None:
    calm, output, faults = tmp_path / "calm", tmp_path / "out", tmp_path / "faults"
    pruner = {**ANNEALING, "iterations": 3}
    expected = run(faulty(calm, faults, pruner, executor="local"))
    faults.mkdir()
    for name in ("hang", "short-1", "short-2"):
        (faults / name).touch()
    result = run(faulty(output, faults, pruner, unit_timeout=4.0))
    assert list(faults.iterdir()) == [], "not every fault has happened"
    assert told(result) == told(expected)
    assert records(output) == records(calm)


def test_a_job_that_lacks_memory_fails_and_goes_on_when_there_is_enough(tmp_path: Path) -> None:
    calm, output, faults = tmp_path / "calm", tmp_path / "out", tmp_path / "faults"
    pruner = {"type": "L1Filter"}
    expected = run(faulty(calm, faults, pruner, executor="local"))
    faults.mkdir()
    (faults / "small").touch()
    content = {**faulty(output, faults, pruner, replicas=1), "tracking": {}}
    with pytest.raises(EvaluationError, match=r"^all 1 trials failed: L1Filter") as caught:
        run(content)
    text = str(caught.value)
    assert "lost its replica 3 times: RuntimeError: " in text and "allocate memory" in text
    assert "give each replica more memory" in text
    failures = [record[3] for record in records(output).values() if record[3] is not None]
    assert failures and all("give each replica more memory" in each for each in failures)
    assert states(output) == ["FAILED"] * 2  # the job's, and its trial's
    (faults / "small").unlink()
    result = run(content)
    assert told(result) == told(expected)
    assert not any("failed" in note for note in result.notes), result.notes
    assert states(output) == ["FINISHED"] * 2
