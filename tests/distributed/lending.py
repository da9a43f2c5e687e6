"""A replica that runs on the CPU whatever it is lent, and says what that was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from raycompress.distributed import slots
from raycompress.distributed.slots import OnNode
from raycompress.storage import write_whole


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


def run_lent_trial(
    payload: Mapping[str, Any],
    make_pool: Callable[..., Any],
    report: Callable[[int, Mapping[str, float]], None],
    shared: Any,
) -> None:
    """Leaves what its replicas were lent, while all of a job's trials hold theirs."""
    slots.OnNode = LentReplica  # type: ignore[misc]
    folder, own = Path(payload["folder"]), f"{payload['name']}.lent"
    with make_pool() as pool:
        lent = [each["gpus"] for each in ray.get([r.probe.remote([]) for r in pool.replicas])]
        write_whole(folder / own, json.dumps(lent).encode())
        end = time.monotonic() + 120
        while len(list(folder.glob("*.lent"))) < payload["num_trials"]:
            assert time.monotonic() < end, "the other trials never ran beside it"
            time.sleep(0.05)


def lent_to(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a trial left."""
    path = Path(payload["folder"]) / f"{payload['name']}.lent"
    return {"gpus": json.loads(path.read_text())} if path.exists() else None
