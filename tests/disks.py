"""A disk that fills while a job runs on it."""

from __future__ import annotations

from pathlib import Path

KB = 1024


def fill(disk: Path, leave: int = 0) -> Path:
    """Fills a disk but for some bytes; returns the file to remove."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4 * KB)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    return ballast


class Filling:
    """A job's progress, by which its disk is filled in the middle of a search."""

    def __init__(self, disk: Path, leave: int) -> None:
        self.disk, self.leave, self.steps = disk, leave, 0
        self.messages: list[str] = []

    def stage(self, name: str) -> None:
        self.messages.append(name)

    def step(self, text: str, done: int = 0, total: int | None = None) -> None:
        self.steps += 1
        if self.steps == 1:
            fill(self.disk, self.leave)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        pass
