"""One driver at a time for an output in an object store, which has no locks.

An object `lock` names its holder, who writes it anew every few seconds. Another driver that finds
it watches whether it changes: if so it is refused, if not the holder is gone and it takes over. No
clocks are compared. A store that can't write under a condition can't do more: of two drivers that
start within the same second both may go on, until one reads the other's name at its next beat and
stops itself, as does one that was frozen for so long that another took over. Nothing is damaged
meanwhile, for what two drivers write of one job is the same; work may be done twice.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from raycompress.errors import ConfigError, RaycompressError
from raycompress.storage import ObjectPath, Place

__all__ = ["lease", "refusal", "this_process"]

_log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between a holder's signs of life."""
EXPIRY = 20.0
"""Seconds without one after which a holder is gone."""
SETTLE = 1.0
"""Seconds after which a new holder looks whether another came at the same time."""
LENGTH = 256
"""Bytes of the object, always, so that a reader never gets a part of it."""


def this_process() -> str:
    """The driver, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def refusal(output: Place, holder: str) -> ConfigError:
    """What a second driver is told."""
    return ConfigError(
        f"output {output} is being written by another driver ({holder or 'unknown'}); wait for it "
        "or stop it, or give another --output"
    )


@contextmanager
def lease(output: ObjectPath) -> Iterator[None]:
    """Holds an output for this driver alone; waits for up to `EXPIRY` for a holder that is gone.

    If it is lost to another driver, this one is interrupted as by Ctrl-C.

    Raises:
        ConfigError: Another driver holds it, or the store refuses.
        RaycompressError: It was lost.
    """
    own = _Lease(output)
    try:
        own.take()
    except OSError as error:
        raise ConfigError(f"output {output} can't be written: {error}") from error
    beats = threading.Thread(target=own.hold, name="lease", daemon=True)
    beats.start()
    try:
        yield
    finally:
        own.ended.set()
        beats.join()
        own.release()


class _Lease:
    def __init__(self, output: ObjectPath) -> None:
        self.output, self.place = output, output / "lock"
        self.owner, self.num_beats = uuid.uuid4().hex, 0
        self.ended, self.lost = threading.Event(), False
        self.in_main = threading.current_thread() is threading.main_thread()

    def take(self) -> None:
        """Waits until nobody holds the output, and then does."""
        before = self._read()
        deadline = time.monotonic() + EXPIRY
        while before is not None and time.monotonic() < deadline:
            time.sleep(min(SETTLE, BEAT / 2))
            now = self._read()
            if now is not None and now != before:
                raise refusal(self.output, _holder(now))
            before = now
        self._write()
        time.sleep(SETTLE)
        now = self._read()
        if not self._is_own(now):
            raise refusal(self.output, _holder(now))

    def hold(self) -> None:
        """Gives signs of life until the end."""
        while not self.ended.wait(BEAT):
            try:
                if not self._is_own(self._read()):
                    self.lost = True
                    break
                self._write()
            except OSError as error:  # the store may come back; until then nobody can take over
                _log.warning("no sign of life in %s: %s", self.place, error)
        if self.lost and self.in_main:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)  # wakes it, whatever it waits for

    def release(self) -> None:
        """Lets the next driver start at once."""
        if self.lost:
            raise RaycompressError(
                f"output {self.output} was taken over by another driver, for this one gave no sign "
                f"of life for {EXPIRY:g} s; what was finished is kept"
            )
        if self._is_own(self._read()):
            self.place.unlink(missing_ok=True)

    def _is_own(self, content: bytes | None) -> bool:
        return content is not None and json.loads(content)["owner"] == self.owner

    def _read(self) -> bytes | None:
        try:
            return self.place.read_bytes()
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self.num_beats += 1
        content = {"owner": self.owner, "beat": self.num_beats, "holder": this_process()[:128]}
        self.place.write_bytes(json.dumps(content).ljust(LENGTH).encode())


def _holder(content: bytes | None) -> str:
    return "" if content is None else str(json.loads(content)["holder"])
