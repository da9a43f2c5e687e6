"""Latency of several models on one device, measured in turns so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

__all__ = ["LatencyRow", "file_size", "measure"]

Inputs = tuple[Any, ...] | dict[str, Any] | Tensor


@dataclass(frozen=True)
class LatencyRow:
    """Forward time of one model at one batch size, in milliseconds; p10 and p90 are the spread."""

    name: str
    batch_size: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int


def measure(
    models: Mapping[str, nn.Module],
    inputs: Callable[[int], Inputs] | Inputs,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 20,
    warmup: int = 3,
    device: str | torch.device | None = None,
) -> list[LatencyRow]:
    """Measures forward passes in evaluation and inference mode.

    Args:
        models: name -> model; each is moved to the device for the measurement and back.
        inputs: function of the batch size, or example inputs, whose tensors are repeated or cut
            along the first dim.
        batch_sizes: batch sizes to measure.
        repeats: timed passes of each model.
        warmup: passes of each model before.
        device: where; the device of the first model's first parameter if not given.
    """
    if device is None:
        device = next((p.device for m in models.values() for p in m.parameters()), "cpu")
    device = torch.device(device)
    rows = []
    homes = {n: next((p.device for p in m.parameters()), device) for n, m in models.items()}
    modes = [(m, m.training) for model in models.values() for m in model.modules()]
    try:
        for model in models.values():
            model.to(device).eval()
        for size in batch_sizes:
            batch = inputs(size) if callable(inputs) else _resized(inputs, size)
            batch = _moved(batch, device)
            times: dict[str, list[float]] = {name: [] for name in models}
            with torch.inference_mode():
                for turn in range(warmup + repeats):
                    for name, model in models.items():
                        took = _timed(model, batch, device)
                        if turn >= warmup:
                            times[name].append(took)
            for name, values in times.items():
                p10, median, p90 = np.percentile(values, [10, 50, 90])
                rows.append(
                    LatencyRow(name, size, float(median), float(p10), float(p90), len(values))
                )
    finally:
        for name, model in models.items():
            model.to(homes[name])
        for module, training in modes:
            module.training = training
    return rows


def _timed(model: nn.Module, batch: Inputs, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    if isinstance(batch, dict):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, tuple) else (batch,)))
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
