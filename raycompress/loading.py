"""From YAML or a mapping to a `JobConfig`: the edge at which everything is checked.

A small walk over the dataclasses collects every mistake with its key and line; single values are
judged by pydantic, strictly: "3" is no integer, 3 is a fine number.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from raycompress.budget import Budget
from raycompress.config import JobConfig
from raycompress.errors import ConfigError, InputError
from raycompress.identity import sources_of
from raycompress.importing import resolve
from raycompress.pruning import Pruner
from raycompress.schema import field_docs, json_schema, pruner_types
from raycompress.search import digest_of
from raycompress.source import Source, plain, to_yaml
from raycompress.task import Task
from raycompress.tuning.entries import corners, has_spaces, places
from raycompress.tuning.spaces import read_space
from raycompress.wording import KeyPath, describe, dotted, near, shown

__all__ = [
    "build_pruner",
    "dump_job",
    "job_key",
    "json_schema",
    "load_job",
    "load_source",
    "parse_job",
    "pruner_types",
    "resolve",
]

NOT_RESULTS = ("name", "output", "cluster", "tracking")
"""Keys of a job that its results don't depend on."""


def load_job(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> JobConfig:
    """Reads and checks a job file.

    Args:
        path: A YAML file.
        overrides: `key.path=value` texts, applied in order before anything is checked.

    Raises:
        ConfigError: Each mistake on a line of its own, with file, line, key and what is allowed.
    """
    return load_source(path, overrides)[0]


def load_source(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), output: str | None = None
) -> tuple[JobConfig, Source]:
    """`load_job`, with the source as well, which knows the lines of later mistakes."""
    source = Source.read(path)
    source.override(overrides)
    if output is not None:
        source.put(("output",), output, "--output")
    return _job(source), source


def parse_job(mapping: Mapping[str, Any], source: str = "job") -> JobConfig:
    """Checks a job given as a mapping; `source` stands for the file in messages."""
    return _job(Source(source, plain(mapping)))


def build_pruner(entry: Mapping[str, Any], key: str = "pruner") -> Pruner:
    """Constructs a pruner from its mapping.

    Args:
        entry: `type`, and the pruner's own keys.
        key: Where it stands in the job, such as "pruners[0]".

    Raises:
        ConfigError: Each mistake on a line of its own, with key and what is allowed.
    """
    check = _Check()
    pruner = check.pruner(plain(entry), (key,))
    if pruner is None:
        raise ConfigError("\n".join(message for _, message in check.problems))
    return pruner


def dump_job(config: JobConfig) -> str:
    """A job as YAML text that `load_job` reads back, every default written out."""
    return to_yaml(dataclasses.asdict(config))


def job_key(config: JobConfig) -> str:
    """Digest of everything in a job that determines its results.

    Defaults count as if they were written out, so that they may be or not; of a file of weights
    its content counts, not its name, and of the user's own classes their source.
    """
    content = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_RESULTS}
    content["pruners"] = [_pruner_key(each, i) for i, each in enumerate(config.pruners)]
    if config.tune is not None:  # more samples, or more of them kept, go on with the same job
        content["tune"] = {
            k: v for k, v in content["tune"].items() if k not in ("num_samples", "keep")
        }
    content["budgets"] = [str(Budget.of(values)) for values in config.budgets]
    if config.model.weights is not None:
        with Path(config.model.weights).expanduser().open("rb") as file:
            content["model"]["weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    resolve(config.task, Task)
    content["sources"] = sources_of([config.task, *config.pruners])
    return digest_of(content)


def _pruner_key(entry: Mapping[str, Any], index: int) -> object:
    if has_spaces(entry):
        return plain(entry)
    pruner = build_pruner(entry, f"pruners[{index}]")
    return [f"{type(pruner).__module__}:{type(pruner).__qualname__}", dataclasses.asdict(pruner)]


def _job(source: Source) -> JobConfig:
    check = _Check()
    data = source.data
    config = check.build(JobConfig, data, ())
    # Looked at whether or not the rest is in order, so that all mistakes show at once.
    for index, entry in enumerate(_mappings(data.get("pruners"))):
        if entry is not None:
            check.pruner_or_space(entry, ("pruners", index))
    for index, values in enumerate(_mappings(data.get("budgets"))):
        if values is not None:
            check.budget(values, ("budgets", index))
    task = data.get("task")
    if isinstance(task, str) and not re.fullmatch(r"[\w.]+:[\w.]+", task):
        check.fail(("task",), f"task must be 'package.module:Class', got {shown(task)}")
    if check.problems or not isinstance(config, JobConfig):
        problems = sorted(check.problems, key=lambda problem: source.line(problem[0]))
        raise ConfigError("\n".join(source.error(path, message) for path, message in problems))
    return config


def _mappings(value: object) -> list[dict[str, Any] | None]:
    """The mappings in a list, None for other entries, which are a problem already."""
    items = value if isinstance(value, list) else []
    return [item if isinstance(item, dict) else None for item in items]


class _Check:
    """Builds dataclasses from plain data, and collects what is wrong with it.

    Attributes:
        problems: (key path, message that starts with the key), in the order found.
    """

    def __init__(self) -> None:
        self.problems: list[tuple[KeyPath, str]] = []

    def fail(self, path: KeyPath, message: str) -> None:
        self.problems.append((path, message))

    def build(self, cls: type, data: object, path: KeyPath) -> object:
        """An instance, or None after a problem."""
        key = dotted(path)
        if not isinstance(data, dict):
            self.fail(path, f"{key} must be a mapping of keys to values, got {shown(data)}")
            return None
        before = len(self.problems)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for name in data:
            if name not in fields:
                allowed = f"; it has {', '.join(fields)}" if fields else "; it has none"
                whose = cls.__name__ if issubclass(cls, Pruner) else key or "a job"
                self.fail(
                    (*path, name),
                    f"{dotted((*path, name))} is no key of {whose}{near(name, fields, allowed)}",
                )
        values = {}
        for name, field in fields.items():
            inner = (*path, name)
            if name in data:
                values[name] = self.value(hints[name], data[name], inner)
            elif field.default is field.default_factory is dataclasses.MISSING:
                doc = field_docs(cls).get(name, describe(hints[name]))
                self.fail(path, f"{dotted(inner)} is missing: {doc.rstrip('.')}")
        if len(self.problems) > before:
            return None
        try:
            result: object = cls(**values)
        except (InputError, ValueError) as error:
            self.fail(*_relocate(str(error), cls, path, fields))
            return None
        return result

    def value(self, hint: Any, value: object, path: KeyPath) -> object:
        """A field's value, checked; None after a problem."""
        arguments = typing.get_args(hint)
        origin = typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType) and type(None) in arguments:
            if value is None:
                return None
            rest = [argument for argument in arguments if argument is not type(None)]
            if len(rest) == 1:
                return self.value(rest[0], value, path)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.build(hint, value, path)
        if origin is tuple and arguments[1:] == (...,):
            if not isinstance(value, list):
                hint_text = f"; write [{value}]" if isinstance(value, str | int | float) else ""
                self.fail(path, f"{dotted(path)} must be a list, got {shown(value)}{hint_text}")
                return None
            return tuple(
                self.value(arguments[0], item, (*path, index)) for index, item in enumerate(value)
            )
        return self.leaf(hint, value, path)

    def leaf(self, hint: Any, value: object, path: KeyPath) -> object:
        """A value that pydantic judges."""
        reason = ""
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            reason = "plain data with finite numbers"
        else:
            try:
                # JSON, since strict JSON input turns a list into a tuple and 3 into 3.0.
                return _adapter(hint).validate_json(text, strict=True)
            except pydantic.ValidationError as error:
                reason = describe(hint) or error.errors()[0]["msg"]
        known = [a for a in typing.get_args(hint) if isinstance(a, str)]
        self.fail(path, f"{dotted(path)} must be {reason}, got {shown(value)}{near(value, known)}")
        return None

    def pruner(self, entry: object, path: KeyPath) -> Pruner | None:
        """A pruner, or None after a problem."""
        key = dotted(path)
        if not isinstance(entry, dict):
            self.fail(path, f"{key} must be a mapping with a type, got {shown(entry)}")
            return None
        known = pruner_types()
        name = entry.get("type")
        if not isinstance(name, str):
            got = f", got {shown(name)}" if "type" in entry else ""
            self.fail(
                (*path, "type"),
                f"{key}.type must be one of {', '.join(known)}, or an import path "
                f"'package.module:Class'{got}",
            )
            return None
        if ":" in name:
            try:
                cls = resolve(name, Pruner, f"{key}.type")
            except ConfigError as error:
                self.fail((*path, "type"), str(error))
                return None
            if not dataclasses.is_dataclass(cls):
                self.fail((*path, "type"), f"{key}.type: {name!r} must be a dataclass")
                return None
        elif name in known:
            cls = known[name]
        else:
            allowed = f"; there are {', '.join(known)}, and import paths 'package.module:Class'"
            self.fail(
                (*path, "type"), f"{key}.type: no pruner {name!r}{near(name, known, allowed)}"
            )
            return None
        keys = {k: v for k, v in entry.items() if k != "type"}
        built = self.build(cls, keys, path)
        return built if isinstance(built, Pruner) else None

    def pruner_or_space(self, entry: dict[str, Any], path: KeyPath) -> None:
        """Checks a pruner; of one with spaces, their corners."""
        if not has_spaces(entry):
            self.pruner(entry, path)
            return
        before = len(self.problems)
        spaces = {}
        for at, value in places(entry):
            try:
                spaces[at] = read_space(value, (*path, *at))
            except ConfigError as error:
                self.fail((*path, *at), str(error))
        if len(self.problems) == before:
            for corner in corners(entry, spaces):
                self.pruner(corner, path)
            self.problems = list(dict.fromkeys(self.problems))

    def budget(self, values: Mapping[str, Any], path: KeyPath) -> None:
        """Checks a budget, each resource by itself."""
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                self.fail(
                    (*path, name),
                    f"{dotted((*path, name))} must be a percentage kept such as 50%, or a number "
                    f"above 0, got {shown(value)}",
                )
                continue
            try:
                Budget.of({name: value}, dotted(path))
            except InputError as error:
                self.fail((*path, name), str(error))
        if not values:
            self.fail(path, f"{dotted(path)} must name a resource, such as {{macs: 50%}}")


def _relocate(
    message: str, cls: type, path: KeyPath, fields: Mapping[str, object]
) -> tuple[KeyPath, str]:
    """Puts the job's key in place of the class or field that a constructor's message names."""
    message = message.removeprefix(f"{cls.__name__}: ")
    match = re.match(r"(?:\w+\.)*(\w+)\b", message)
    if match and match[1] in fields:
        inner = (*path, match[1])
        return inner, dotted(inner) + message[match.end() :]
    return path, f"{dotted(path)}: {message}" if path else message


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(hint)
