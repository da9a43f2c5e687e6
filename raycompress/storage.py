"""Places of a job's output: paths that all machines see, or addresses in an object store.

A path is a `pathlib.Path`, with all its speed. An `ObjectPath` has those of its methods that an
object store can keep, so most code takes either. Whoever writes goes through `write_whole`; whoever
needs a folder of the local disk, as MLflow and other libraries do, goes through `staged`.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from raycompress.errors import ConfigError, StorageError

__all__ = [
    "ObjectPath",
    "Place",
    "Segments",
    "local_copy",
    "place_of",
    "read_all",
    "staged",
    "write_whole",
    "writing",
]

T = TypeVar("T")

SCHEMES = ("s3", "gs")
PATIENCE = 60.0
"""Seconds for which a store that doesn't answer is asked again."""
NO_USE = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "NO_SUCH_BUCKET", "UNRECOGNIZED")
"""Of answers that asking again doesn't change."""
NUM_THREADS = 16
"""Objects that are read at a time."""


@dataclass(frozen=True)
class ObjectPath:
    """An object's address, or the prefix that stands for a folder.

    Objects appear whole or not at all, and are durable when `write_bytes` returns. Who reads one
    while it is replaced gets one of both if they are of one length, else perhaps a part. A store
    that doesn't answer is asked again for `PATIENCE` seconds.

    Attributes:
        uri: Without query, and without a slash at its end.
        query: Options of pyarrow's file system, such as "endpoint_override=host:9000".
    """

    uri: str
    query: str = ""

    def __str__(self) -> str:
        return f"{self.uri}?{self.query}" if self.query else self.uri

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.uri}/{name}", self.query)

    @property
    def name(self) -> str:
        """Its last part."""
        return self.uri.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        """The folder that it is in."""
        return ObjectPath(self.uri.rpartition("/")[0], self.query)

    @property
    def _key(self) -> str:
        return self.uri.partition("://")[2]

    @property
    def _system(self) -> Any:
        scheme, _, key = self.uri.partition("://")
        return _system(f"{scheme}://{key.partition('/')[0]}", self.query)

    def exists(self, patience: float = PATIENCE) -> bool:
        """There is an object, or anything below it."""
        from pyarrow.fs import FileType

        info = _patiently(lambda: self._system.get_file_info(self._key), patience)
        return bool(info.type != FileType.NotFound)

    def read_bytes(self) -> bytes:
        """The object.

        Raises:
            FileNotFoundError: There is none.
        """

        def read() -> bytes:
            # One request: a stream makes several, and may mix two versions of an object.
            with self._system.open_input_file(self._key) as file:
                content: bytes = file.read()
            return content

        return _patiently(read)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Makes the object, in place of one that is there."""

        def write() -> None:
            with self._system.open_output_stream(self._key) as stream:
                stream.write(data)

        _patiently(write)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        try:
            _patiently(lambda: self._system.delete_file(self._key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def objects(self, suffix: str = "") -> list[ObjectPath]:
        """All objects below it, at any depth, whose names end so, in order of name."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._key, allow_not_found=True, recursive=True)
        found = _patiently(lambda: self._system.get_file_info(selector))
        start = len(self._key) + 1
        names = [info.path[start:] for info in found if info.type == FileType.File]
        return [self / name for name in sorted(names) if name.endswith(suffix)]


Place = Path | ObjectPath
"""Of a file or a folder."""


def place_of(value: str | os.PathLike[str] | ObjectPath) -> Place:
    """A place from how users write it: a path, or a URI of one of `SCHEMES` or of a file.

    Raises:
        ConfigError: A URI that can't be used; it starts with the URI, without secrets.
    """
    if isinstance(value, ObjectPath):
        return value
    text = os.fspath(value)
    if "://" not in text:
        return Path(text)
    parts = urlsplit(text)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"{parts.scheme}://***@{parts.hostname}{parts.path} must not hold credentials: they "
            "would be in logs; set them in the environment, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, on all nodes"
        )
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and not parts.query:
        return Path(parts.path)
    folder = parts.path.strip("/")
    if parts.scheme not in SCHEMES or not parts.netloc or not folder or parts.fragment:
        raise ConfigError(
            f"{text} must be a path, file:///folder, s3://bucket/folder or gs://bucket/folder"
        )
    if any(part in ("", ".", "..") for part in folder.split("/")):
        raise ConfigError(f"{text} must not have '.', '..' or nothing between slashes")
    if secret := re.search(r"secret|password|token|access_key", parts.query, re.I):
        raise ConfigError(
            f"{parts.scheme}://{parts.netloc}{parts.path}?... must not hold credentials "
            f"({secret[0]}): they would be in logs; set them in the environment, on all nodes"
        )
    place = ObjectPath(f"{parts.scheme}://{parts.netloc}/{folder}", parts.query)
    try:
        _ = place._system
    except (OSError, ValueError, NotImplementedError) as error:
        names = ", ".join(name for name, _ in parse_qsl(parts.query)) or "none"
        raise ConfigError(f"{text} can't be used (options: {names}): {error}") from error
    return place


@contextmanager
def writing(place: Place, num_bytes: int | None = None) -> Iterator[None]:
    """Says what a full disk means.

    Args:
        place: What is written.
        num_bytes: How much; None: unknown.

    Raises:
        StorageError: There is no space left, or none within the quota.
    """
    try:
        yield
    except Exception as error:
        # safetensors has an error of its own, which keeps the number only in its text.
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or any(
            f"(os error {each})" in str(error) for each in (errno.ENOSPC, errno.EDQUOT)
        )
        if not full or isinstance(error, StorageError):
            raise
        needed = "" if num_bytes is None else f" {num_bytes:,} bytes to"
        there = None
        if isinstance(place, Path):
            there = next((p for p in (place, *place.parents) if p.exists()), None)
        free = "" if there is None else f", {shutil.disk_usage(there).free:,} bytes are free"
        raise StorageError(
            f"no space left to write{needed} {place}{free}; what was finished is kept: make room, "
            "and the same command continues"
        ) from error


def write_whole(place: Place, data: bytes) -> None:
    """Writes a file that appears whole or not at all, and is durable when this returns.

    Raises:
        StorageError: There is no space left.
    """
    if isinstance(place, ObjectPath):
        place.write_bytes(data)
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}.partial")
    with writing(place, len(data)):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except OSError:
            temporary.unlink(missing_ok=True)  # it would take the room that there is
            raise


def read_all(places: Sequence[ObjectPath]) -> list[bytes]:
    """Objects, in order; many at a time."""
    if not places:
        return []
    with ThreadPoolExecutor(min(NUM_THREADS, len(places))) as threads:
        return list(threads.map(ObjectPath.read_bytes, places))


@contextmanager
def local_copy(place: Place) -> Iterator[Path]:
    """A file for who reads from the local disk alone.

    Raises:
        FileNotFoundError: There is none in the store.
    """
    if not isinstance(place, ObjectPath):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="raycompress-") as folder:
        path = Path(folder) / place.name
        path.write_bytes(place.read_bytes())
        yield path


@contextmanager
def staged(folder: Place) -> Iterator[Path]:
    """A folder as one of the local disk, made if it isn't there.

    A path is itself. For an object store it is a temporary copy; when the block is left, however
    it ends, what is new or changed is put back. Nothing is removed from the store.
    """
    if not isinstance(folder, ObjectPath):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="raycompress-") as name:
        local = Path(name)
        objects = folder.objects()
        before: dict[str, bytes] = {}
        for each, data in zip(objects, read_all(objects), strict=True):
            below = each.uri[len(folder.uri) + 1 :]
            before[below] = data
            (local / below).parent.mkdir(parents=True, exist_ok=True)
            (local / below).write_bytes(data)
        try:
            yield local
        finally:
            for path in sorted(each for each in local.rglob("*") if each.is_file()):
                below, data = path.relative_to(local).as_posix(), path.read_bytes()
                if before.get(below) != data:
                    (folder / below).write_bytes(data)


class Segments:
    """A file that grows, in a store that has no append: an object for each `commit`.

    Objects are named `<stem>.<time>-<random><suffix>` beside where the file would be, so that two
    writers never write one, and names sort by time of writing.

    Args:
        place: Where the file would be.
    """

    def __init__(self, place: ObjectPath) -> None:
        self.place = place
        self._lines: list[bytes] = []

    @staticmethod
    def of(place: ObjectPath) -> list[ObjectPath]:
        """The objects of a growing file."""
        stem, dot, suffix = place.name.rpartition(".")
        pattern = re.compile(re.escape(stem) + r"\.\d{19}-[0-9a-f]{8}" + re.escape(dot + suffix))
        found = place.parent.objects(dot + suffix)
        return [each for each in found if pattern.fullmatch(each.name)]

    def write(self, data: bytes) -> None:
        """Whole lines, kept until `commit`."""
        self._lines.append(data)

    def commit(self) -> None:
        """Returns when all that was written is in the store."""
        if self._lines:
            stem, dot, suffix = self.place.name.rpartition(".")
            name = f"{stem}.{time.time_ns():019d}-{uuid.uuid4().hex[:8]}{dot}{suffix}"
            (self.place.parent / name).write_bytes(b"".join(self._lines))
            self._lines.clear()

    def close(self) -> None:
        """Commits."""
        self.commit()


@functools.lru_cache(maxsize=8)
def _system(bucket: str, query: str) -> Any:
    """One file system, with its connections, for each bucket and process."""
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(f"{bucket}/?{query}" if query else bucket)[0]


def _patiently(ask: Callable[[], T], patience: float = PATIENCE) -> T:
    """Asks a store again until it answers."""
    deadline, pause = time.monotonic() + patience, 0.2
    while True:
        try:
            return ask()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if any(word in str(error) for word in NO_USE) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
