"""What the command line does with its two streams."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import typer
from rich.console import Console

from raycompress.errors import InterruptedJob, RaycompressError
from raycompress.signals import ignored

__all__ = ["Stopped", "guarded", "nothing_on_stdout", "show_error", "unexpected"]


class Stopped(RaycompressError):
    """Ctrl-C, while the job goes on elsewhere. Exit code 130."""

    exit_code = 130


def guarded(action: Callable[[], None], debug: bool) -> None:
    """Runs a command; errors become one message and an exit code."""
    try:
        action()
    except (typer.Exit, typer.Abort):
        raise
    except RaycompressError as error:
        if debug:
            raise
        with ignored():
            show_error(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        with ignored():
            show_error("stopped; the same command starts again")
        raise typer.Exit(InterruptedJob.exit_code) from None
    except Exception as error:
        # The task's own code, or a bug: what it takes to find it is kept, off the screen.
        if debug:
            raise
        show_error(unexpected(error))
        raise typer.Exit(RaycompressError.exit_code) from None


def show_error(message: str) -> None:
    """Prints an error to stderr, each of its lines as one."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in message.splitlines():
        console.print("[bold red]error:[/] ", end="")
        console.print(line, markup=False)


def unexpected(error: Exception) -> str:
    """One line on an error that nobody raised on purpose; its traceback goes to a file."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="raycompress-", suffix=".log", delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename] or list(frames)
    reason = (str(error).splitlines() or [""])[0]
    return (
        f"{type(error).__name__}: {reason} ({own[-1].filename}, line {own[-1].lineno}); "
        f"the traceback is in {file.name}"
    )


@contextmanager
def nothing_on_stdout() -> Iterator[None]:
    """Sends to stderr what others print, such as Ray, its workers and the task.

    Also below Python, so that stdout holds the result and nothing else.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
