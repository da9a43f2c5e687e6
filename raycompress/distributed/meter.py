"""The replica that measures latency where that isn't any of those that work: at a target device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raycompress.config import ClusterConfig
from raycompress.distributed.cluster import bundle, check_feasible, reserve
from raycompress.distributed.slots import Slot, check_alike, wait_ready
from raycompress.distributed.spec import SharedSpec
from raycompress.units import HostInfo

__all__ = ["Meter"]


PATIENCE = 1800.0
"""Seconds that a trial waits for a device which others hold."""


class Meter:
    """A place for one replica, which starts when it is asked for.

    In trials, of which several may want one device, it waits for that, and takes no CPU by Ray's
    count: replicas, of its own trial too, may hold all of the node's, and would wait for it.

    Args:
        cluster: Of the replicas that work: its deadlines, and what isn't said of this one.
        target: Ray resources; CPU and GPU are as in `cluster` where they aren't given.
        trial: It is one of several trials'.

    Attributes:
        slot: The replica; None: it hasn't started, or was lost.

    Raises:
        ClusterError: No node has these resources.
    """

    def __init__(
        self, cluster: ClusterConfig, target: Mapping[str, float], *, trial: bool = False
    ) -> None:
        own = {name: amount for name, amount in target.items() if name not in ("CPU", "GPU")}
        cpus, gpus = target.get("CPU", cluster.cpus), target.get("GPU", cluster.gpus)
        self._cluster = replace(cluster, cpus=cpus, gpus=gpus, resources=own)
        self._device = {**own, **({"GPU": gpus} if gpus else {})} if trial else {}
        self._cpus = 0.0 if trial else None
        self.slot: Slot | None = None
        self._room: Any = None
        what = "the replica that measures latency doesn't fit (latency.resources)"
        check_feasible([bundle(self._cluster)], what, cluster.start_timeout)

    def ready(self, shared: SharedSpec, published: Sequence[Any], info: HostInfo) -> Slot:
        """The replica, started now if it isn't there.

        Args:
            shared: What replicas host.
            published: What all were told.
            info: What the others are.

        Raises:
            ClusterError: It isn't up in time, once it has its device, or has other code or data.
        """
        if self._room is None and self._device:
            who = "the replica that measures latency (latency.resources)"
            timeout = self._cluster.start_timeout
            self._room = reserve([self._device], who, timeout, PATIENCE)
        if self.slot is None:
            place: Any = "DEFAULT"
            if self._room is not None:
                place = PlacementGroupSchedulingStrategy(self._room)

            def start() -> Slot:
                cpus = self._cpus
                return Slot.start("meter", self._cluster, shared, published, place, cpus=cpus)

            slots = [start()]
            try:
                own = wait_ready(slots, start, self._cluster)
                # What it computes counts for nothing: it may be another kind of machine.
                check_alike("meter", replace(own, numeric_class=info.numeric_class), info)
            except BaseException:
                slots[0].kill()
                raise
            (self.slot,) = slots
        return self.slot

    def close(self) -> None:
        """Ends the replica and gives its room back; it may be asked for again."""
        if self.slot is not None:
            self.slot.kill()
            self.slot = None
        if self._room is not None:
            ray.util.remove_placement_group(self._room)
            self._room = None
