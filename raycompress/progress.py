"""Progress of a job: lines for a person, nothing for a program."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.status import Status

__all__ = ["PlainProgress", "Progress", "SilentProgress", "TerminalProgress", "progress_for"]


class Progress(Protocol):
    """Told of what a job does."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def step(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Something within the stage went on."""

    def message(self, text: str) -> None:
        """Something to keep on the screen."""

    def close(self) -> None:
        """The job ends."""


class SilentProgress:
    """Says nothing."""

    def stage(self, name: str) -> None:
        """Nothing."""

    def step(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainProgress:
    """Timestamped lines, for logs and pipes; at most one step line every few seconds.

    Args:
        stream: Where lines go.
        every: Least seconds between two step lines.
    """

    def __init__(self, stream: TextIO | None = None, every: float = 5.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._every = every
        self._last = 0.0

    def stage(self, name: str) -> None:
        """A line."""
        self._last = 0.0
        self.message(name)

    def step(self, text: str, done: int = 0, total: int | None = None) -> None:
        """A line, if the last one is some seconds old."""
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self.message(f"  {_counted(text, done, total)}")

    def message(self, text: str) -> None:
        """A line."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing."""


class TerminalProgress:
    """A spinner with the stage and its last step; finished stages stay on the screen.

    Args:
        console: On a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console(stderr=True)
        self._status: Status | None = None
        self._name = ""
        self._start = 0.0

    def stage(self, name: str) -> None:
        """Ends the stage before it."""
        self._finish()
        self._name, self._start = name, time.monotonic()
        self._status = self._console.status(escape(name))
        self._status.start()

    def step(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Shown beside the spinner."""
        if self._status is not None:
            step = escape(_counted(text, done, total))
            self._status.update(f"{escape(self._name)}  [dim]{step}[/]")

    def message(self, text: str) -> None:
        """Stays on the screen."""
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Ends the last stage."""
        self._finish()

    def _finish(self) -> None:
        if self._status is not None:
            self._status.stop()
            seconds = time.monotonic() - self._start
            # `close` also runs while an error passes by, and then the stage isn't done.
            sign = "[green]✓[/]" if sys.exc_info()[0] is None else "[red]✗[/]"
            self._console.print(f"{sign} {escape(self._name)} [dim]{seconds:.1f} s[/]")
            self._status = None


def _counted(text: str, done: int, total: int | None) -> str:
    return text if total is None else f"{text} {done}/{total}"


def progress_for(quiet: bool = False) -> Progress:
    """What fits where stderr goes."""
    if quiet:
        return SilentProgress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()
