"""A replica that runs on the CPU whatever it is lent, and says what that was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from raycompress.distributed.slots import OnNode


class LentReplica(OnNode):
    """Thinks that it has no GPU."""

    def __init__(self, name: str, gpu: bool) -> None:
        super().__init__(name, False)
        self.asked_for_gpu = gpu

    def probe(self, modules: Sequence[str]) -> dict[str, Any]:
        """What Ray lent, and whether the weights are a view of Ray's shared memory."""
        context = ray.get_runtime_context()
        assert self.host is not None
        maps = []
        with open("/proc/self/maps") as file:
            for line in file:
                span, _, rest = line.partition(" ")
                start, end = (int(each, 16) for each in span.split("-"))
                maps.append((start, end, rest))
        tensors = [t for weights in self.host._states.values() for t in weights.state.values()]
        places = [
            next(rest for start, end, rest in maps if start <= tensor.data_ptr() < end)
            for tensor in tensors
            if tensor.numel()
        ]
        return {
            "gpus": context.get_accelerator_ids()["GPU"],
            "resources": context.get_assigned_resources(),
            "asked": self.asked_for_gpu,
            "shared": [permissions[3] == "s" for permissions in places],
        }
