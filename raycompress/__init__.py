"""raycompress: make trained PyTorch models smaller and faster, on a Ray cluster.

Names are loaded when they are first used, so that `import raycompress` stays light; neither ray
nor mlflow is loaded before a job needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycompress.artifacts import load, save
    from raycompress.config import JobConfig
    from raycompress.driver import run
    from raycompress.errors import RaycompressError, TaskError
    from raycompress.masks import Masks, hold, load_masks, masked_copy, save_masks
    from raycompress.materialization import Materialized, materialize
    from raycompress.pruning import L1Filter, Level, Pruner, SimulatedAnnealing
    from raycompress.results import JobResult
    from raycompress.structure import analyze, slim, verify
    from raycompress.targets import Target, config_list
    from raycompress.task import ClassificationTask, Split, Task, split_indices

_HOMES = {
    "ClassificationTask": "task",
    "JobConfig": "config",
    "JobResult": "results",
    "L1Filter": "pruning",
    "Level": "pruning",
    "Masks": "masks",
    "Materialized": "materialization",
    "Pruner": "pruning",
    "RaycompressError": "errors",
    "SimulatedAnnealing": "pruning",
    "Split": "task",
    "Target": "targets",
    "Task": "task",
    "TaskError": "errors",
    "analyze": "structure",
    "config_list": "targets",
    "hold": "masks",
    "load": "artifacts",
    "load_masks": "masks",
    "masked_copy": "masks",
    "materialize": "materialization",
    "run": "driver",
    "save": "artifacts",
    "save_masks": "masks",
    "slim": "structure",
    "split_indices": "task",
    "verify": "structure",
}

__all__ = [
    "ClassificationTask",
    "JobConfig",
    "JobResult",
    "L1Filter",
    "Level",
    "Masks",
    "Materialized",
    "Pruner",
    "RaycompressError",
    "SimulatedAnnealing",
    "Split",
    "Target",
    "Task",
    "TaskError",
    "analyze",
    "config_list",
    "hold",
    "load",
    "load_masks",
    "masked_copy",
    "materialize",
    "run",
    "save",
    "save_masks",
    "slim",
    "split_indices",
    "verify",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raycompress' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"raycompress.{_HOMES[name]}"), name)
    globals()[name] = value  # `raycompress.run` is the function, not the module of that name
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
