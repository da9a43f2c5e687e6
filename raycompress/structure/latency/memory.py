"""Peak memory that a forward pass takes beyond what is there before it: parameters and inputs.

On CUDA the allocator's own peak. On the CPU, whose allocator keeps no peak, the running sum of all
its allocations and releases during the pass, as the profiler records them: outputs of operators
and workspaces alike, but not what a kernel library takes from the system by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(forward: Callable[[], Any], device: torch.device) -> int:
    """Bytes live at once during `forward`, at their peak, beyond those live before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        torch.cuda.synchronize(device)
        return max(torch.cuda.max_memory_allocated(device) - before, 0)
    with (
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run,
    ):
        forward()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(accumulate((event.nbytes() for event in events), initial=0)))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keeps two lines that the profiler's C++ side prints for each profile off the screen."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
