"""From YAML or a mapping to a `JobConfig`: the edge at which everything is checked.

Every mistake is collected, with its key and line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from raycompress.budget import Budget
from raycompress.candidate import digest_of
from raycompress.checking import Check
from raycompress.config import JobConfig
from raycompress.errors import ConfigError
from raycompress.identity import sources_of
from raycompress.importing import resolve
from raycompress.pruning import Pruner
from raycompress.quantization import Quantizer
from raycompress.quantize_section import QuantizeSection
from raycompress.schema import json_schema, pruner_types
from raycompress.source import Source, plain, to_yaml
from raycompress.storage import ObjectPath
from raycompress.task import Task
from raycompress.tuning.entries import has_spaces
from raycompress.wording import shown

__all__ = [
    "build_pruner",
    "build_quantizer",
    "dump_job",
    "job_key",
    "json_schema",
    "load_job",
    "load_source",
    "parse_job",
    "pruner_types",
    "resolve",
]

T = TypeVar("T")

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
    path: str | os.PathLike[str] | ObjectPath,
    overrides: Sequence[str] = (),
    output: str | None = None,
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
    check = Check()
    return _sound(check, check.pruner(plain(entry), (key,)))


def build_quantizer(
    entry: Mapping[str, Any], key: str = "quantize"
) -> tuple[Quantizer, QuantizeSection]:
    """Constructs a quantizer from a job's `quantize`, and what else that says.

    Raises:
        ConfigError: Each mistake on a line of its own, with key and what is allowed.
    """
    check = Check()
    return _sound(check, check.quantizer(plain(entry), (key,)))


def _sound(check: Check, built: T | None) -> T:
    if built is None:
        raise ConfigError("\n".join(message for _, message in check.problems))
    return built


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
    if config.quantize is None:
        del content["quantize"]
    else:
        content["quantize"] = [_class_and_fields(each) for each in build_quantizer(config.quantize)]
    content["budgets"] = [str(Budget.of(values)) for values in config.budgets]
    if config.model.weights is not None:
        with Path(config.model.weights).expanduser().open("rb") as file:
            content["model"]["weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    resolve(config.task, Task)
    content["sources"] = sources_of([config.task, *config.pruners, config.quantize])
    return digest_of(content)


def _pruner_key(entry: Mapping[str, Any], index: int) -> object:
    if has_spaces(entry):
        return plain(entry)
    return _class_and_fields(build_pruner(entry, f"pruners[{index}]"))


def _class_and_fields(value: Any) -> object:
    return [f"{type(value).__module__}:{type(value).__qualname__}", dataclasses.asdict(value)]


def _job(source: Source) -> JobConfig:
    check = Check()
    data = source.data
    config = check.build(JobConfig, data, ())
    # Looked at whether or not the rest is in order, so that all mistakes show at once.
    for index, entry in enumerate(_mappings(data.get("pruners"))):
        if entry is not None:
            check.pruner_or_space(entry, ("pruners", index))
    if isinstance(data.get("quantize"), dict):
        check.quantizer(data["quantize"], ("quantize",))
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
