"""What a job tells whoever keeps its results; one process writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from raycompress.errors import TrackingError

__all__ = ["NoTracker", "Point", "Refused", "Status", "Tracker"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
Point = tuple[int, float, Mapping[str, float]]
"""Of a curve: step, time in seconds since 1970, figures."""


class Refused(TrackingError):
    """The tracking store answers, and refuses; asking again would change nothing."""


class Tracker(Protocol):
    """One run: a job's, or the child run of one of its trials."""

    @property
    def run_id(self) -> str:
        """Identifies the run in the tracking store; "" without one."""

    def child(self, name: str) -> Tracker:
        """The child run of a trial; the same name continues the same run, also after a restart."""

    def log_params(self, params: Mapping[str, str | int | float | bool | None]) -> None:
        """Settings; logging one anew changes nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Figures, at a step of a curve or (None) as the run's own."""

    def log_curve(self, points: Sequence[Point]) -> None:
        """Steps of a curve; one that a continued run holds already is not logged twice."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder of files."""

    def describe(self, text: str) -> None:
        """A description in Markdown, that the run's page opens with."""

    def log_model(
        self, model: nn.Module, example_inputs: tuple[Any, ...], registered_name: str | None = None
    ) -> str:
        """The model as one that others load without the code that made it; returns its URI."""

    def log_onnx(
        self,
        path: Path,
        example_inputs: tuple[Any, ...],
        weights: str,
        registered_name: str | None = None,
    ) -> str:
        """An ONNX file as a model that MLflow loads with onnxruntime; returns its URI."""

    def finish(self, status: Status) -> None:
        """Ends the run in a true state."""


class NoTracker:
    """Keeps nothing."""

    run_id = ""

    def child(self, name: str) -> Tracker:
        """Itself."""
        return self

    def log_params(self, params: Mapping[str, str | int | float | bool | None]) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Nothing."""

    def log_curve(self, points: Sequence[Point]) -> None:
        """Nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def describe(self, text: str) -> None:
        """Nothing."""

    def log_model(
        self, model: nn.Module, example_inputs: tuple[Any, ...], registered_name: str | None = None
    ) -> str:
        """Nothing; returns ""."""
        return ""

    def log_onnx(
        self,
        path: Path,
        example_inputs: tuple[Any, ...],
        weights: str,
        registered_name: str | None = None,
    ) -> str:
        """Nothing; returns ""."""
        return ""

    def finish(self, status: Status) -> None:
        """Nothing."""
