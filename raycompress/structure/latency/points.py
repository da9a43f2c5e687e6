"""The measurements behind a latency table: really slim models, visited in turns, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raycompress.structure.latency.design import Design
from raycompress.structure.latency.layer_times import Visit, pass_seconds, visit
from raycompress.structure.latency.measure import Inputs, batch_of
from raycompress.structure.model import Structure
from raycompress.structure.slim import slim

__all__ = ["device_name", "measure_points"]

_log = logging.getLogger(__name__)

FORMAT = 1


@dataclass
class _File:
    """Visits by point, kept on disk as they come; without a path, in memory alone."""

    path: Path | None
    key: Mapping[str, Any]
    visits: dict[int, list[Visit]] = field(default_factory=dict)
    complete: bool = False

    def load(self, num_points: int, num_times: int) -> None:
        """Takes over what is there, unless it is of something else or damaged."""
        if self.path is None or not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            if content["key"] != self.key:
                raise ValueError("it belongs to another measurement")
            self.visits = {
                int(point): [Visit(float(w), tuple(map(float, times))) for w, times in visits]
                for point, visits in content["visits"].items()
            }
            if any(len(v.layers) != num_times for each in self.visits.values() for v in each):
                raise ValueError("its times aren't those of this model's layers")
            self.complete = bool(content["complete"])
            if self.complete and not all(self.visits.get(p) for p in range(num_points)):
                raise ValueError("points are missing")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("latency table %s is measured anew: %s", self.path, error)
            self.visits, self.complete = {}, False

    def save(self) -> None:
        """Writes all; the file appears whole or not at all."""
        if self.path is None:
            return
        content = {
            "key": self.key,
            "complete": self.complete,
            "visits": {
                point: [[v.whole, v.layers] for v in visits]
                for point, visits in self.visits.items()
            },
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, self.path)


def measure_points(
    model: nn.Module,
    structure: Structure,
    design: Design,
    inputs: Callable[[int], Inputs] | Inputs,
    *,
    batch_size: int,
    device: torch.device,
    folder: Path | None,
    visits: int,
    passes: int,
    max_seconds: float,
    clock: Callable[[], float],
) -> list[list[Visit]]:
    """Visits of each model of the design, its checks last; what is on disk isn't measured again.

    Each round visits every model once, in another random order, so that a disturbance hits one
    visit of a few models and not all visits of one.

    Args:
        model: the dense model.
        structure: its structure.
        design: which slim models.
        inputs: function of the batch size, or example inputs.
        batch_size: examples in a pass.
        device: where.
        folder: where the file of these measurements is kept; None: nowhere.
        visits: of each model.
        passes: in each visit, once with hooks and once without; fewer if time is short.
        max_seconds: aimed at by taking fewer passes; no second or later visit starts after it.
        clock: seconds; for CUDA layers the device's own events are used instead.
    """
    counts = np.concatenate([design.counts, design.checks])
    batch = batch_of(inputs, batch_size, device)
    key = _key(model, structure, design, batch, batch_size, device)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = _File(None if folder is None else Path(folder) / f"{name}.json", key)
    file.load(len(counts), len(structure.sizes.layers) + 1)
    if file.complete:
        return [file.visits[point] for point in range(len(counts))]
    start = clock()
    seconds = pass_seconds(model, batch, device, clock)
    # A slim model takes about half the dense one's time; a visit is one pass and `passes` twice.
    room = max_seconds / max(visits * len(counts) * 0.5 * seconds, 1e-9)
    passes = min(max(int((room - 1) / 2), 1), passes)
    for turn in range(visits):
        order = list(range(len(counts)))
        random.Random(turn).shuffle(order)
        for point in order:
            if len(file.visits.get(point, ())) > turn:
                continue
            if turn and clock() - start > max_seconds:
                break
            kept = {
                g.name: range(int(count))
                for g, count in zip(structure.groups, counts[point], strict=True)
            }
            small = slim(model, structure, kept)
            times = visit(small, structure.sizes.layers, batch, device, passes, clock)
            file.visits.setdefault(point, []).append(times)
            file.save()
    file.complete = True
    file.save()
    _log.info(
        "latency table: %d slim models at batch size %d, %d passes of each, measured in %.1f s",
        len(counts), batch_size, visits * passes, clock() - start,
    )  # fmt: skip
    return [file.visits[point] for point in range(len(counts))]


def device_name(device: torch.device) -> str:
    """The processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _key(
    model: nn.Module,
    structure: Structure,
    design: Design,
    batch: Inputs,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """All that the measured times depend on, except for how busy the machine is."""
    sizes = structure.sizes
    content = hashlib.sha256(repr(sorted(structure.module_types.items())).encode())
    content.update(repr([(g.name, g.num_channels) for g in structure.groups]).encode())
    content.update(repr([(n, leaf.shape) for n, leaf in structure.leaves.items()]).encode())
    for array in (sizes.base, sizes.slope, sizes.factors, sizes.coefficients):
        content.update(np.ascontiguousarray(array).tobytes())
    for array in (design.counts, design.checks):
        content.update(np.ascontiguousarray(array).tobytes())
    return {
        "format": FORMAT,
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)),
        "batch_size": batch_size,
        "inputs": _shapes(batch),
        "model": content.hexdigest(),
    }


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), *value.shape]
    if isinstance(value, dict):
        return {str(k): _shapes(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shapes(v) for v in value]
    return repr(value)
