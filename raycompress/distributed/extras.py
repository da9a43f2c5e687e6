"""Replicas beyond those that a pool reserves: they use what the cluster has over, and give it back.

They stand outside a trial's placement group, so that nodes which join in mid-search are used. Ray
has no priorities: what is over is looked for, and whoever asks for more than there is has it.
Results don't depend on them, as they don't on the number of replicas.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import ray

from raycompress.distributed.slots import Slot
from raycompress.errors import RaycompressError
from raycompress.units import HostInfo

__all__ = ["Extras"]

_log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often the cluster is looked at."""

REST_SECONDS = 30.0
"""How long nothing is started after something was given back, or was lost."""

MAX_FAILURES = 3
"""Replicas that can't start or aren't like the others; after these none is started."""


class Extras:
    """Starts them and gives them back.

    Args:
        most: How many at most.
        asked: Resources of each.
        start: Asks Ray for one.
        patience: Seconds within which one must be up.
    """

    def __init__(
        self, most: int, asked: Mapping[str, float], start: Callable[[], Slot], patience: float
    ) -> None:
        self.slots: list[Slot] = []
        self._most, self._asked, self._start, self._patience = most, asked, start, patience
        self._looked = self._resting_until = 0.0
        self._failures = 0

    def look(self, num_waiting: int, info: HostInfo) -> None:
        """Welcomes those that are up, lets those go that leave, starts or gives back.

        Args:
            num_waiting: Units that nobody works on yet.
            info: What the pool's replicas are.
        """
        now = time.monotonic()
        if not self._most or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for slot in [each for each in self.slots if not each.ready]:
            self._welcome(slot, info, now)
        for slot in [each for each in self.slots if each.leaving and not each.in_flight]:
            self.drop(slot)
        if _others_ask(sum(not slot.ready for slot in self.slots)):
            for slot in self.slots:
                slot.leaving = True
            self._resting_until = now + REST_SECONDS
        elif num_waiting and now >= self._resting_until and self._failures < MAX_FAILURES:
            free = ray.available_resources()
            room = min(int(free.get(name, 0.0) / each + 1e-6) for name, each in self._asked.items())
            for _ in range(min(room, num_waiting, self._most - len(self.slots))):
                self.slots.append(self._start())

    def _welcome(self, slot: Slot, info: HostInfo, now: float) -> None:
        done, _ = ray.wait([slot.setup], timeout=0)
        try:
            lost = slot.welcome(done, info)
        except RaycompressError as error:  # of another kind than the others, or its node lacks code
            lost = str(error)
        if lost is not None:
            self._failures += 1
            self.drop(slot, lost)
        elif not slot.ready and now - slot.started > self._patience:
            self.drop(slot, f"it wasn't up within {self._patience:g} s")

    def drop(self, slot: Slot, reason: str = "") -> None:
        """Ends one; its room is another's."""
        if reason:
            _log.warning("%s, beyond the reserved ones, leaves: %s", slot.name, reason)
            self._resting_until = time.monotonic() + REST_SECONDS
        slot.kill()
        self.slots.remove(slot)

    def close(self) -> None:
        """Ends all."""
        for slot in list(self.slots):
            self.drop(slot)


def _others_ask(num_own: int) -> bool:
    """Whether anybody but so many of our own waits for resources."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands
    if demands.placement_group_demand or demands.cluster_constraint_demand:
        return True
    waiting = [each for one in demands.ray_task_actor_demand for each in one.bundles_by_count]
    return sum(each.count for each in waiting) > num_own
