"""What results depend on: the user's code and data, and the numeric class of the device."""

from __future__ import annotations

import hashlib
import inspect
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycompress.structure import Structure
from raycompress.task import Task

__all__ = [
    "data_digest",
    "numeric_class",
    "source_digest",
    "sources_of",
    "structure_digest",
    "task_digest",
]


def source_digest(cls: type) -> str:
    """SHA-256 over the modules that define a class and its bases, as 16 hex digits.

    So that a user's edited code isn't answered with what it found before the edit. Modules of
    raycompress and of Python don't count, nor do modules that these modules import; what was
    defined at an interactive prompt has no source. "" if nothing counts.
    """
    content = hashlib.sha256()
    names = dict.fromkeys(base.__module__ for base in cls.__mro__)
    own = [n for n in names if n.partition(".")[0] not in {"raycompress", *sys.stdlib_module_names}]
    for name in own:
        content.update(name.encode())
        content.update(_source(sys.modules.get(name)))
    return content.hexdigest()[:16] if own else ""


def _source(module: object) -> bytes:
    try:
        return inspect.getsource(module).encode()  # type: ignore[arg-type]
    except (OSError, TypeError):
        return b"no source"


def sources_of(value: object) -> dict[str, str]:
    """`source_digest` of the user's classes that plain data names by "package.module:Class".

    Only classes whose modules have been imported: who checked the data has imported them.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return {path: digest for item in value for path, digest in sources_of(item).items()}
    if not isinstance(value, str) or not re.fullmatch(r"[\w.]+:[\w.]+", value):
        return {}
    module, _, name = value.partition(":")
    found: object = sys.modules.get(module)
    for word in name.split("."):
        found = getattr(found, word, None)
    digest = source_digest(found) if isinstance(found, type) else ""
    return {value: digest} if digest else {}


def task_digest(task: Task) -> str:
    """SHA-256 over a task's import path, attributes and source, as 16 hex digits."""
    cls = type(task)
    content = hashlib.sha256(f"{cls.__module__}:{cls.__qualname__}".encode())
    content.update(_source(inspect.getmodule(cls)))
    content.update(source_digest(cls).encode())
    plain = {
        name: value
        for name, value in sorted(vars(task).items())
        if isinstance(value, str | int | float | bool | None)
    }
    content.update(repr(plain).encode())
    return content.hexdigest()[:16]


def numeric_class(device: torch.device, threads: int) -> str:
    """Names what the last bits of a score depend on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}; bfloat16"
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {cpu}; torch {torch.__version__}; {threads} threads"


def _update_with_tensors(content: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in sorted(value):
            _update_with_tensors(content, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _update_with_tensors(content, item)
    else:
        content.update(repr(value).encode())


def data_digest(datasets: Mapping[str, Any]) -> str:
    """SHA-256 over the sizes and three examples of each split, as 16 hex digits."""
    content = hashlib.sha256()
    for data in datasets.values():
        for index in sorted({0, len(data) // 2, len(data) - 1}):
            _update_with_tensors(content, data[index])
    content.update(repr(sorted((name, len(data)) for name, data in datasets.items())).encode())
    return content.hexdigest()[:16]


def structure_digest(structure: Structure) -> str:
    """SHA-256 over what each channel of each group holds, as 16 hex digits.

    Kept counts and channel indices mean something within one structure alone.
    """
    content = hashlib.sha256()
    for group in structure.groups:
        content.update(f"{group.name}:{group.num_channels};".encode())
        for member in group.members:
            content.update(f"{member.parameter}:{member.dim};".encode())
            content.update(np.ascontiguousarray(member.indices, dtype=np.int64).tobytes())
    return content.hexdigest()[:16]
