"""The ledger: an append-only record of finished work, content-addressed.

Every finished unit is on disk before a search uses it; a restarted job replays its search, and the
ledger answers at once what was finished before. One folder holds a part for each writer
(`<part>.jsonl`; in an object store, where nothing can be appended, an object for each commit), and
every reader reads them all.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raycompress.errors import RaycompressError
from raycompress.storage import ObjectPath, Place, Segments, place_of, read_all, writing

__all__ = ["Ledger", "answers", "read_ledger", "scan_ledger"]

Record = dict[str, Any]

COMMIT_SECONDS = 1.0
"""Longest that a finished unit waits for its fsync while others come in; a group shares one."""


def _records(lines: Iterable[bytes], place: Place) -> Iterator[tuple[Record, int]]:
    """Each whole record of a part, and the offset at which it ends."""
    end = 0
    for line in lines:
        if not line.endswith(b"\n"):
            return  # the tail that a crash tore
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RaycompressError(
                f"ledger {place} is damaged at byte {end}: {error}; "
                "move the file away to evaluate its records again"
            ) from error
        end += len(line)
        yield record, end


def _part(path: Path) -> Iterator[tuple[Record, int]]:
    with path.open("rb") as file:
        yield from _records(file, path)


def scan_ledger(folder: str | Path | ObjectPath) -> Iterator[Record]:
    """Each whole record below a ledger folder, in order of part name, then of writing."""
    place = place_of(folder)
    if isinstance(place, ObjectPath):
        objects = place.objects(".jsonl")
        for each, data in zip(objects, read_all(objects), strict=True):
            for record, _ in _records(data.splitlines(keepends=True), each):
                yield record
    else:
        for path in sorted(place.glob("*.jsonl")):
            for record, _ in _part(path):
                yield record


def answers(folder: str | Path | ObjectPath) -> Iterator[Record]:
    """One record for each key: a failure that was tried again gives way to what came of that."""
    answered: set[str] = set()
    failed: dict[str, Record] = {}
    for record in scan_ledger(folder):
        if record.get("again"):
            failed[record["key"]] = record
        elif record["key"] not in answered:
            answered.add(record["key"])
            yield record
    yield from (record for key, record in failed.items() if key not in answered)


def read_ledger(folder: str | Path | ObjectPath) -> list[Record]:
    """All whole records below a ledger folder, in order of part name, then of writing."""
    return list(scan_ledger(folder))


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _packed(line: bytes) -> bytes:
    return zlib.compress(line, 1)


class _File:
    """A part on a file system: appended to, under a lock."""

    def __init__(self, path: Path, patience: float) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    self._file.close()
                    raise RaycompressError(
                        f"ledger {path} is being written by another process"
                    ) from error
                time.sleep(0.1)
        self._end = max((end for _, end in _part(path)), default=0)
        self._file.truncate(self._end)

    def write(self, data: bytes) -> None:
        """Outlives this process at once, all or nothing."""
        left = memoryview(data)
        with writing(self._path, len(data)):
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                self._file.truncate(self._end)  # no torn line before the next one
                raise
        self._end += len(data)

    def commit(self) -> None:
        """Outlives the machine."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Releases the lock."""
        self._file.close()


class Ledger:
    """Finished work by key; a context manager that holds its own part's lock.

    In an object store there is no such lock: an orphan of a killed job that still writes adds
    objects of its own, with records that are as true.

    Args:
        folder: The ledger's folder, path or URI, made if it is not there.
        part: Name of the part that this writer appends to. One writer at a time: another process's
            lock is waited for, since an orphan of a killed job ends within seconds.
        patience: Seconds to wait for it.

    Raises:
        RaycompressError: The part is still locked, or damaged.
    """

    def __init__(
        self, folder: str | Path | ObjectPath, part: str, *, patience: float = 30.0
    ) -> None:
        self.folder = place_of(folder)
        path = self.folder / f"{part}.jsonl"
        self._writer: _File | Segments = (
            Segments(path) if isinstance(path, ObjectPath) else _File(path, patience)
        )
        self._pending, self._committed = False, time.monotonic()
        # Compressed: as objects, 100,000 records take hundreds of MB.
        self._known: dict[str, bytes] = {
            record["key"]: _packed(_line(record)) for record in answers(self.folder)
        }

    def get(self, key: str) -> Record | None:
        """The record of a key, or None."""
        packed = self._known.get(key)
        if packed is None:
            return None
        record: Record = json.loads(zlib.decompress(packed))
        return record

    def put(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Appends records by key and returns when they are on disk: one fsync for all."""
        self.append(records)
        self.commit()

    def append(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Appends records by key.

        They outlive this process at once (in an object store: as they outlive the machine), and
        the machine after the next `commit`, or the next `append` that comes `COMMIT_SECONDS` after
        the last.

        Raises:
            StorageError: There is no space left; nothing was appended.
        """
        lines = {key: _line({"key": key, **record}) for key, record in records.items()}
        self._writer.write(b"".join(lines.values()))
        self._known |= {key: _packed(line) for key, line in lines.items()}
        self._pending = True
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Returns when all that was appended is on disk."""
        if self._pending:
            self._writer.commit()
            self._pending = False
        self._committed = time.monotonic()

    def close(self) -> None:
        """Releases the part."""
        self.commit()
        self._writer.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._known)
