"""Tasks and trial functions that replicas and trials import by path."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycompress.candidate import Candidate, Ranking
from raycompress.ledger import Ledger
from raycompress.testing import ToyTask


class SignallingTask(ToyTask):
    """A toy task whose evaluations leave marks, sleep, or kill their process.

    Args:
        folder: Where marks go: `started-<pid>-<n>` for each evaluation.
        sleep: Seconds that the first evaluation of all replicas takes; the others take none.
        hang: The same, and no evaluation of that candidate is ever quick.
        poison: Kept channels of the candidate that kills every process that evaluates it.
        each: Seconds that every evaluation takes.
        short: So many evaluations run out of memory: the first ones.
    """

    def __init__(
        self,
        folder: str,
        sleep: float = 0.0,
        poison: int = 0,
        each: float = 0.0,
        hang: int = 0,
        short: int = 0,
    ) -> None:
        super().__init__()
        self.short = short
        self.folder, self.sleep, self.poison = folder, sleep, poison
        self.each, self.hang = each, hang

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Marks, then sleeps or dies, then computes."""
        if not torch.is_grad_enabled() and not model.training:
            mark = Path(self.folder) / f"started-{os.getpid()}-{time.monotonic_ns()}"
            mark.touch()
            width = model.fc.in_features  # type: ignore[union-attr]
            if self.poison and width == self.poison:
                os.kill(os.getpid(), signal.SIGKILL)
            if any(_first(Path(self.folder) / f"short-{i}") for i in range(self.short)):
                torch.empty(1 << 50)  # a petabyte
            if self.hang and width == self.hang:
                time.sleep(600)
            if self.sleep and _first(Path(self.folder) / "first"):
                (Path(self.folder) / "sleeper").write_text(str(os.getpid()))
                time.sleep(self.sleep)
            time.sleep(self.each)
        return super().forward(model, batch)


def _first(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class BusyTask(ToyTask):
    """Each evaluation takes about `seconds` of CPU time."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(num=16)
        self.seconds = seconds

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Burns time on matrix products, as a forward pass would."""
        if not model.training:
            end = time.process_time() + self.seconds
            matrix: Tensor = torch.ones(64, 64)
            while time.process_time() < end:
                matrix @ matrix
        return super().forward(model, batch)


class BrokenTask(ToyTask):
    """Can't be made."""

    def __init__(self) -> None:
        raise RuntimeError("no data here")


def run_search_trial(
    payload: Mapping[str, Any],
    make_pool: Callable[..., Any],
    report: Callable[[int, Mapping[str, float]], None],
    shared: Mapping[str, Any],
) -> None:
    """Evaluates candidates of several widths, one step for each; a trial as the job layer's are."""
    ranking: Ranking = shared["ranking"]
    name = next(iter(ranking.orders))
    scores = []
    with (
        Ledger(payload["ledger"], payload["part"]) as ledger,
        make_pool(ledger=ledger) as pool,
    ):
        pool.publish(ranking)
        for step, count in enumerate(payload["counts"]):
            if payload.get("die") == step and _first(Path(payload["ledger"]) / "died"):
                (Path(payload["ledger"]) / "trial-pid").write_text(str(os.getpid()))
                time.sleep(600)  # the test kills the process here
            if step and (
                payload.get("falls") == "always"
                or (payload.get("falls") == "once" and _first(Path(payload["ledger"]) / f"{step}"))
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            candidate = Candidate.of({name: count}, ranking, weights=shared["weights"])
            trial = pool.evaluate([candidate])[0]
            scores.append(trial.score)
            report(step, {"score": trial.score, "count": float(count)})
    if payload.get("fail"):
        raise RuntimeError("the trial's own words")
    result = {"scores": scores, "num_evaluated": pool.num_evaluated}
    marker(payload).write_text(json.dumps(result))


def marker(payload: Mapping[str, Any]) -> Path:
    """What such a trial leaves when it has finished."""
    return Path(payload["ledger"]) / f"{payload['part']}.finished.json"


def finished(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """Its result."""
    path = marker(payload)
    return json.loads(path.read_text()) if path.exists() else None
