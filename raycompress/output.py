"""A job's output folder: one driver at a time, and one job, whose settings `job.yaml` keeps."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raycompress.config import JobConfig
from raycompress.errors import ConfigError, InputError
from raycompress.hiding import hidden
from raycompress.lease import lease, refusal, this_process
from raycompress.loading import NOT_RESULTS, build_pruner, parse_job
from raycompress.source import Source, plain, to_yaml
from raycompress.storage import ObjectPath, Place, place_of, write_whole
from raycompress.tracking.address import masked_uri
from raycompress.wording import KeyPath, dotted, shown

__all__ = ["check_changes", "check_output", "keep_job", "lock", "own_id"]

LISTS = ("pruners", "budgets", "seeds")
"""Keys whose lists may grow: what was found for the entries that stay is still true."""
OPTIONAL = (("sensitivity",), ("quantize",))
"""Keys that may come and go: what they add is beside what was found."""
FREE = (("tune", "num_samples"), ("tune", "keep"))
"""Keys that say how much of the same is done."""


def check_output(config: JobConfig) -> Place:
    """The job's output folder, absolute; checked, not made.

    Raises:
        ConfigError: It can't be a folder that this process writes to.
    """
    asked = config.output if config.output is not None else f"~/.raycompress/{config.name}"
    try:
        place = place_of(asked)
    except ConfigError as error:
        raise ConfigError(f"output: {error}") from None
    if isinstance(place, ObjectPath):
        _check_store(config, place)
        return place
    output = place.expanduser().absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"output {output} can't be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK) or _read_only(there):
        raise ConfigError(f"output {output} can't be written: no permission in {there}")
    return output


def _check_store(config: JobConfig, output: ObjectPath) -> None:
    """Raises a ConfigError if an object store doesn't answer, or a job needs a folder."""
    uri = config.tracking.uri
    if uri is None or urlsplit(uri).scheme not in ("", "http", "https", "sqlite"):
        given = "nothing" if uri is None else masked_uri(uri)
        raise ConfigError(
            "tracking.uri must be a server's address, a SQLite file on the driver's machine or "
            f"none where output is in an object store, got {given}"
        )
    try:
        bucket = ObjectPath("/".join(output.uri.split("/")[:3]), output.query)
        there = bucket.exists(patience=0)
    except OSError as error:
        raise ConfigError(f"output {output} can't be reached: {error}") from error
    if not there:
        raise ConfigError(f"output {output} can't be made: there is no bucket {bucket.name!r}")


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


@contextmanager
def lock(output: Place) -> Iterator[None]:
    """Holds an output folder, made if it isn't there, for this driver alone.

    Raises:
        ConfigError: It can't be made, or another driver holds it.
    """
    if isinstance(output, ObjectPath):
        with lease(output):
            yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"output {output} can't be made: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise refusal(output, file.read().strip()) from None
        file.truncate(0)
        file.write(this_process())
        file.flush()
        yield


def keep_job(config: JobConfig, output: Place) -> None:
    """Writes `job.yaml`, without secrets."""
    write_whole(output / "job.yaml", to_yaml(hidden(asdict(config))).encode())


def own_id(output: Place) -> str:
    """What tells an output's runs from those of others that hold the same job."""
    path = output / "id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12].encode())
    return path.read_text()


def check_changes(config: JobConfig, output: Place) -> None:
    """Refuses to mix two jobs in one output.

    The same job continues. So does one that asks for more pruners, budgets, seeds or samples, and
    with or without a sensitivity analysis or quantization; where and how it runs may change.

    Raises:
        ConfigError: With each key that changed, its old and its new value.
    """
    path = output / "job.yaml"
    if not path.exists():
        return
    try:
        old = _settings(parse_job(Source.read(path).data))
    except InputError as error:
        raise ConfigError(
            f"output {output} holds a job that can't be read any more ({error}); give another "
            "--output, or go on with --changed, which keeps what still holds"
        ) from error
    changes = list(_changes(old, _settings(config), ()))
    if changes:
        name = Source.read(path).data["name"]
        raise ConfigError(
            "\n".join(changes)
            + f"\noutput {output} holds the job {name!r} with other settings; change them back to "
            "continue it, give another --output, or go on with --changed, which keeps what still "
            "holds and replaces the results"
        )


def _settings(config: JobConfig) -> dict[str, Any]:
    """What results depend on, every default written out, without secrets."""
    content = {k: v for k, v in hidden(asdict(config)).items() if k not in NOT_RESULTS}
    content["pruners"] = [_whole(entry) for entry in content["pruners"]]
    return content


def _whole(entry: Mapping[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(InputError):  # spaces stand for values
        return {"type": entry["type"], **plain(asdict(build_pruner(entry)))}
    return dict(entry)


def _changes(old: object, new: object, path: KeyPath) -> Iterator[str]:
    if old == new or path in FREE or (path in OPTIONAL and None in (old, new)):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), (*path, key))
    elif isinstance(old, list) and isinstance(new, list):
        if path in [(name,) for name in LISTS] and all(item in new for item in old):
            return
        if len(old) == len(new):
            for index, (one, two) in enumerate(zip(old, new, strict=True)):
                yield from _changes(one, two, (*path, index))
            return
        yield f"{dotted(path)} was {shown(old)}, now {shown(new)}"
    else:
        yield f"{dotted(path)} was {shown(old)}, now {shown(new)}"
