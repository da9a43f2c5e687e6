"""A task that keeps books: whoever hosts it notes when a unit of work begins and when it ends.

One side file for all processes; a line is one write, so that lines don't mix.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from raycompress.host import ModelHost
from raycompress.testing import ToyTask
from raycompress.units import Unit, UnitResult


class ChaosTask(ToyTask):
    """A toy task whose units take their time and leave lines in a side file.

    Neither argument is one of the plain attributes on which results depend.

    Args:
        log: The side file.
        seconds: Of each forward pass.
    """

    def __init__(self, log: str, seconds: float = 0.0) -> None:
        super().__init__()
        self.log, self.pause = Path(log), (seconds,)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Takes a while."""
        time.sleep(self.pause[0])
        return super().forward(model, batch)


@dataclass(frozen=True)
class Event:
    """One line of the side file.

    Attributes:
        what: "begun" or "ended".
        pid: Of the process that hosts the model.
        time: On the machine's monotonic clock, in seconds.
        work: What the unit does: candidate and split, as text.
        shards: Which shards.
    """

    what: str
    pid: int
    time: float
    work: str
    shards: tuple[int, ...]

    @property
    def unit(self) -> tuple[str, tuple[int, ...]]:
        """What is to be done once."""
        return self.work, self.shards


def work_of(candidate: Any, split: Any, kind: str) -> str:
    """A unit's work, as text; trained or collected once, whatever the split."""
    return json.dumps([kind, candidate, split if kind == "evaluation" else None], sort_keys=True)


def _append(path: Path, event: Event) -> None:
    line = json.dumps([event.what, event.pid, event.time, event.work, event.shards]) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


_run = ModelHost.run


def _recorded(host: ModelHost, unit: Unit, *rest: Any) -> UnitResult:
    task = host.task
    if not isinstance(task, ChaosTask):
        return _run(host, unit, *rest)
    candidate = unit.candidate
    kind = (
        "collection"
        if candidate.collect is not None
        else "training"
        if candidate.training is not None
        else "evaluation"
    )
    work = work_of(json.loads(json.dumps(candidate.key())), unit.split, kind)
    _append(task.log, Event("begun", os.getpid(), time.monotonic(), work, unit.shards))
    result = _run(host, unit, *rest)
    _append(task.log, Event("ended", os.getpid(), time.monotonic(), work, unit.shards))
    return result


ModelHost.run = _recorded  # type: ignore[method-assign]
