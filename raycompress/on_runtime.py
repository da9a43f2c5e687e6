"""Candidates on the runtime that they are for: lowered where they are timed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from raycompress.builder import Builder
from raycompress.candidate import Candidate
from raycompress.errors import EvaluationError
from raycompress.quantization.lowering import Lowered, lowering

__all__ = ["FLOAT", "on_runtime"]

FLOAT = "float of "
"""Before a candidate's name: the float model that it was made of, on the same runtime."""


def on_runtime(
    builder: Builder, candidates: Mapping[str, Candidate], runtime: str, folder: Path
) -> dict[str, nn.Module]:
    """Quantized candidates, and float models that they were made of, on the CPU.

    Args:
        builder: Builds them, on whatever device.
        candidates: By name, each with `quantize` or of weights that are quantized. Where the name
            begins with `FLOAT`, the float model is meant.
        runtime: A backend that computes in integers.
        folder: Of the files; empty.

    Raises:
        RaycompressError: The backend isn't here, or can't take a candidate.
    """
    names: dict[Candidate, list[str]] = {}
    for name, candidate in candidates.items():
        names.setdefault(candidate, []).append(name)
    models: dict[str, nn.Module] = {}
    for index, (candidate, own) in enumerate(names.items()):
        place = folder / str(index)
        place.mkdir()
        with_float = any(name.startswith(FLOAT) for name in own)
        lowered = _lowered(builder, candidate, runtime, place, with_float)
        for name in own:
            model = lowered.reference if name.startswith(FLOAT) else lowered.model
            assert model is not None
            models[name] = model
    return {name: models[name] for name in candidates}


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
