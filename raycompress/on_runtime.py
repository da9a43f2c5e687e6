"""Candidates on the runtime that they are for: lowered where they are timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from raycompress.builder import Builder
from raycompress.candidate import Candidate
from raycompress.errors import EvaluationError, StorageError
from raycompress.quantization.lowering import Lowered, lowering
from raycompress.structure.latency.measure import batch_of, forward
from raycompress.units import lacks_memory

__all__ = ["FLOAT_OF", "on_runtime"]

FLOAT_OF = "float of "
"""Before a candidate's name: the float model that it was made of, on the same runtime."""


def on_runtime(
    builder: Builder,
    candidates: Mapping[str, Candidate],
    runtime: str,
    batch_sizes: Sequence[int],
    folder: Path,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Quantized candidates, and float models that they were made of, on the CPU.

    Args:
        builder: Builds them, on whatever device.
        candidates: By name, each with `quantize` or of weights that are quantized. Where the name
            begins with `FLOAT_OF`, the float model is meant.
        runtime: A backend that computes in integers.
        batch_sizes: That they are tried at.
        folder: Of the files; empty.

    Returns:
        By name those that run, and of the others why they don't.
    """
    names: dict[Candidate, list[str]] = {}
    for name, candidate in candidates.items():
        names.setdefault(candidate, []).append(name)
    models: dict[str, nn.Module] = {}
    failures: dict[str, str] = {}
    for index, (candidate, own) in enumerate(names.items()):
        place = folder / str(index)
        place.mkdir()
        try:
            with_float = any(name.startswith(FLOAT_OF) for name in own)
            lowered = _lowered(builder, candidate, runtime, place, with_float)
            for name in own:
                model = lowered.reference if name.startswith(FLOAT_OF) else lowered.model
                assert model is not None
                _try(builder, model, batch_sizes)
                models[name] = model
        except (StorageError, OSError):  # no candidate's failure
            raise
        except Exception as error:
            if lacks_memory(error):  # another process may have more
                raise
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
            failures |= {name: reason for name in own if name not in models}
    return models, failures


def _lowered(
    builder: Builder, candidate: Candidate, runtime: str, folder: Path, with_float: bool
) -> Lowered:
    how = builder.quantization(candidate)
    if how is None:
        raise EvaluationError(f"on {runtime}: a candidate isn't quantized")
    task, batches = builder.task, builder.cpu_calibration(how.batches)

    def feed(model: nn.Module) -> None:
        for batch in batches:
            task.forward(model, batch)

    lower = lowering(runtime, "runtime")
    lowered = lower(
        builder.build(candidate).cpu(),
        builder.float_twin(candidate).cpu() if with_float else None,
        task.example_inputs(),
        folder,
        feed,
        how,
    )
    lowered.check()
    return lowered


def _try(builder: Builder, model: nn.Module, batch_sizes: Sequence[int]) -> None:
    """Raises what a model raises at one of the sizes, such as one whose batch size is fixed."""
    with torch.inference_mode():
        for size in batch_sizes:
            forward(model, batch_of(builder.task.example_inputs(), size, torch.device("cpu")))
