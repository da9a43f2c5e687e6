"""Curves of trials while they run, and the verdict on those that are hopeless."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raycompress.trial import metrics_of, point_of
from raycompress.tuning import Halving

__all__ = ["OnReport", "Watch"]

OnReport = Callable[[str, int, Mapping[str, float]], None]
"""Called with (trial, step, metrics) as searches go on."""


class Watch:
    """Keeps what trials report, passes it on, and says which of them are to stop.

    Args:
        report: Told of each step of each trial.
        halving: Judges them; None: all go on.

    Attributes:
        curves: Points by trial.
        stopped: The step at which a trial was to stop, by name.
    """

    def __init__(self, report: OnReport, halving: Halving | None) -> None:
        self.report, self.halving = report, halving
        self.curves: dict[str, list[dict[str, Any]]] = {}
        self.stopped: dict[str, int] = {}
        self._groups: dict[str, str] = {}

    def compare(self, name: str, group: str) -> None:
        """Says with which others a trial is compared: those of the same group."""
        self._groups[name] = group
        self.curves[name] = []

    def remember(self, name: str, group: str, curve: Sequence[Mapping[str, Any]]) -> None:
        """Takes up the curve of a trial that ended in an earlier run."""
        self.compare(name, group)
        for point in curve:
            self(name, point["step"], metrics_of(point))
        self.stopped.pop(name, None)

    def __call__(self, name: str, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes a step of a trial; whether the trial is to stop."""
        self.curves[name].append(point_of(step, metrics))
        self.report(name, step, metrics)
        if self.halving is None:
            return False
        group, loss = self._groups[name], metrics["within_loss"]
        if self.halving.stops(group, name, step + 1, loss):
            self.stopped[name] = step
        return name in self.stopped
