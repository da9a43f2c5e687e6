"""Ctrl-C and SIGTERM: a job that is asked once stops in good order, asked twice at once.

Either is a KeyboardInterrupt. What must not be cut short stands in `held` or in `ignored`, which
are for what ends by itself within seconds. Signals reach a process's main thread alone: in any
other these do nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["held", "ignore", "ignored", "terminable"]

BOTH = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, which ends a submitted job, stops as Ctrl-C does."""
    with _handled(_interrupt, (signal.SIGTERM,)):
        yield


@contextmanager
def held() -> Iterator[None]:
    """Lets the block end before a signal interrupts; a second one interrupts the block.

    Raises:
        KeyboardInterrupt: A signal came.
    """
    came = threading.Event()

    def hold(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    with _handled(hold):
        yield
    if came.is_set():
        raise KeyboardInterrupt


@contextmanager
def ignored() -> Iterator[None]:
    """Drops signals: what goes on is the end already."""
    # Not SIG_IGN, which processes that are started here would inherit.
    with _handled(lambda number, frame: None):
        yield


def ignore() -> None:
    """From here on signals are ignored, to the end of the process.

    For what little Python and Ray do then: a local cluster would leave processes behind.
    """
    for number in BOTH:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None],
    numbers: tuple[signal.Signals, ...] = BOTH,
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, kept in before.items():
            signal.signal(number, kept)
