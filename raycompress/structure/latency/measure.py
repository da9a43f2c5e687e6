"""Latency of several models on one device, measured in turns so that drift hits all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from raycompress.structure.latency.memory import peak_bytes

__all__ = [
    "Inputs",
    "LatencyRow",
    "batch_of",
    "file_size",
    "forward",
    "measure",
    "measuring",
    "synchronize",
]

Inputs = tuple[Any, ...] | dict[str, Any] | Tensor


@dataclass(frozen=True)
class LatencyRow:
    """One model at one batch size.

    Attributes:
        name: of the model.
        batch_size: examples in a forward pass.
        median_ms: milliseconds of a forward pass, the median.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        repeats: timed passes; fewer than asked for if time ran out.
        min_ms: the fastest pass; least disturbed by what else the machine does.
        peak_bytes: most memory that the pass takes beyond parameters and inputs.
        file_bytes: of the model's weights as a file.
        failure: why there are no times; "" if there are.
    """

    name: str
    batch_size: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int
    min_ms: float
    peak_bytes: int
    file_bytes: int
    failure: str = ""

    @staticmethod
    def failed(name: str, batch_size: int, failure: str) -> LatencyRow:
        """Of a model that can't be timed."""
        nan = float("nan")
        return LatencyRow(name, batch_size, nan, nan, nan, 0, nan, 0, 0, failure)


def measure(
    models: Mapping[str, nn.Module],
    inputs: Callable[[int], Inputs] | Inputs,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 20,
    warmup: int = 3,
    device: str | torch.device | None = None,
    max_seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[LatencyRow]:
    """Measures forward passes in evaluation and inference mode.

    Each turn times every model once, in another random order, so that neither drift nor what ran
    before favours one.

    Args:
        models: name -> model; each is moved to the device for the measurement and back.
        inputs: function of the batch size, or example inputs, whose tensors are repeated or cut
            along the first dim.
        batch_sizes: batch sizes to measure.
        repeats: timed passes of each model.
        warmup: passes of each model before.
        device: where; the device of the first model's first parameter if not given.
        max_seconds: no turn starts after this many seconds, shared evenly by the batch sizes; the
            first timed turn always does. None: no limit.
        clock: seconds.
    """
    if device is None:
        device = next((p.device for m in models.values() for p in m.parameters()), "cpu")
    device = torch.device(device)
    rows = []
    sizes = {name: file_size(model) for name, model in models.items()}
    with measuring(models.values(), device):
        for size in batch_sizes:
            batch = batch_of(inputs, size, device)
            start = clock()
            times: dict[str, list[float]] = {name: [] for name in models}
            peaks = {n: peak_bytes(partial(forward, m, batch), device) for n, m in models.items()}
            order = list(models)
            for turn in range(warmup + repeats):
                late = max_seconds is not None and (
                    clock() - start > max_seconds / len(batch_sizes)
                )
                if late and turn < warmup:
                    continue
                if late and all(times.values()):
                    break
                random.Random(turn).shuffle(order)
                for name in order:
                    took = _timed(models[name], batch, device, clock)
                    if turn >= warmup:
                        times[name].append(took)
            for name, values in times.items():
                p10, median, p90 = (float(v) for v in np.percentile(values, [10, 50, 90]))
                row = (name, size, median, p10, p90, len(values), min(values))
                rows.append(LatencyRow(*row, peaks[name], sizes[name]))
    return rows


@contextmanager
def measuring(models: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Models on the device, in evaluation and inference mode; all is put back afterwards."""
    models = list(models)
    homes = [next((p.device for p in m.parameters()), device) for m in models]
    modes = [(m, m.training) for model in models for m in model.modules()]
    try:
        for model in models:
            model.to(device).eval()
        with torch.inference_mode():
            yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)
        for module, training in modes:
            module.training = training


def forward(model: nn.Module, batch: Inputs) -> Any:
    """Calls a model with example inputs of any of the three forms."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*(batch if isinstance(batch, tuple) else (batch,)))


def _timed(
    model: nn.Module, batch: Inputs, device: torch.device, clock: Callable[[], float]
) -> float:
    synchronize(device)
    start = clock()
    forward(model, batch)
    synchronize(device)
    return (clock() - start) * 1e3


def synchronize(device: torch.device) -> None:
    """Waits for what was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batch_of(inputs: Callable[[int], Inputs] | Inputs, size: int, device: torch.device) -> Inputs:
    """Inputs of a batch size on the device; tensors are repeated or cut along the first dim."""
    batch: Inputs = _moved(inputs(size) if callable(inputs) else _resized(inputs, size), device)
    return batch


def _resized(value: Any, size: int) -> Any:
    if isinstance(value, Tensor):
        if not value.dim():
            return value
        return value.repeat(-(-size // value.shape[0]), *[1] * (value.dim() - 1))[:size]
    if isinstance(value, dict):
        return {k: _resized(v, size) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resized(v, size) for v in value)
    return value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(v, device) for v in value)
    return value


def file_size(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers as a safetensors file; tied ones once."""
    unique: dict[tuple[int, tuple[int, ...]], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr() or id(tensor), tuple(tensor.shape))
        unique.setdefault(key, (name, tensor))
    return len(save({n: t.detach().cpu().clone().contiguous() for n, t in unique.values()}))
