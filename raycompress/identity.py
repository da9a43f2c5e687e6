"""What results depend on: the task's code and data, and the numeric class of the device."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycompress.structure import Structure
from raycompress.task import Task

__all__ = ["data_digest", "numeric_class", "structure_digest", "task_digest"]


def task_digest(task: Task) -> str:
    """SHA-256 over a task's import path, attributes and module source, as 16 hex digits."""
    cls = type(task)
    content = hashlib.sha256(f"{cls.__module__}:{cls.__qualname__}".encode())
    try:
        content.update(inspect.getsource(inspect.getmodule(cls) or cls).encode())
    except (OSError, TypeError):
        content.update(b"no source")  # defined at an interactive prompt
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
