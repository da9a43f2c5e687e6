"""Times of a model's layers as it runs.

Timing a layer alone, over and over on the same input, finds its input and weights in the cache and
misses what runs between layers. Here hooks mark when each module's forward begins and ends in a
pass of the whole model. A module's own time is the time within it that is in none of its children;
all modules' own times add up to the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from raycompress.structure.latency.measure import Inputs, forward, measuring, synchronize

__all__ = ["Visit", "pass_seconds", "visit"]


@dataclass(frozen=True)
class Visit:
    """One model's times, each the median over a few passes, in microseconds.

    Attributes:
        whole: of passes without hooks.
        layers: each module's own time, by position in the cost model's layers; last, that of all
            modules which aren't among them.
    """

    whole: float
    layers: tuple[float, ...]


def pass_seconds(
    model: nn.Module, batch: Inputs, device: torch.device, clock: Callable[[], float]
) -> float:
    """Seconds of one pass, after one to warm up."""
    with measuring([model], device):
        forward(model, batch)
        synchronize(device)
        start = clock()
        forward(model, batch)
        synchronize(device)
        return clock() - start


def visit(
    model: nn.Module,
    layers: tuple[str, ...],
    batch: Inputs,
    device: torch.device,
    passes: int,
    clock: Callable[[], float],
) -> Visit:
    """Times a model after one pass to warm up: `passes` without hooks, then as many with them."""
    with measuring([model], device):
        forward(model, batch)
        whole = []
        for _ in range(passes):
            synchronize(device)
            start = clock()
            forward(model, batch)
            synchronize(device)
            whole.append(1e6 * (clock() - start))
        own = []
        present = set(layers) <= {name for name, _ in model.named_modules()}
        with _marked(model, device, clock) as marks:
            for _ in range(passes):
                marks.clear()
                forward(model, batch)
                synchronize(device)
                times = _own_times(marks)
                # A slim model in graph form has none of the modules: all of it is the rest.
                known = layers if present else ()
                rest = sum(time for name, time in times.items() if name not in set(known))
                own.append([*(times.get(name, 0.0) if present else 0.0 for name in layers), rest])
    return Visit(
        round(float(np.median(whole)), 3),
        tuple(round(float(t), 3) for t in np.median(own, axis=0)),
    )


_Mark = tuple[str | None, Any]
"""(module that begins, or None where the one that began last ends; when)."""


@contextmanager
def _marked(
    model: nn.Module, device: torch.device, clock: Callable[[], float]
) -> Iterator[list[_Mark]]:
    """While open, each forward pass appends its marks to the list."""
    marks: list[_Mark] = []

    def now() -> Any:
        if device.type != "cuda":
            return clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    handles = []
    for name, module in model.named_modules():

        def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
            marks.append((name, now()))

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            marks.append((None, now()))

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _own_times(marks: list[_Mark]) -> dict[str, float]:
    """Microseconds within each module and in none of its children."""
    times: dict[str, float] = {}
    stack: list[str] = []
    last = marks[0][1]
    for name, now in marks:
        if stack:
            passed = last.elapsed_time(now) * 1e3 if _is_event(now) else (now - last) * 1e6
            times[stack[-1]] = times.get(stack[-1], 0.0) + passed
        if name is None:
            stack.pop()
        else:
            stack.append(name)
        last = now
    return times


def _is_event(value: Any) -> bool:
    return isinstance(value, torch.cuda.Event)
