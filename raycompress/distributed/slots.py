"""The place of one replica in a pool: its actor, and what is in flight to it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import ray

from raycompress.candidate import Candidate
from raycompress.config import ClusterConfig
from raycompress.distributed.cluster import bundle, describe
from raycompress.distributed.losses import cause_of, loss_reason
from raycompress.distributed.replica import Replica
from raycompress.distributed.spec import SharedSpec
from raycompress.errors import ClusterError
from raycompress.host import MAX_BUILT
from raycompress.units import HostInfo, Unit

__all__ = ["Slot", "answers_of", "check_alike", "finished", "wait_ready"]

SETUP_ATTEMPTS = 3


class OnNode(Replica):
    """A replica that knows where it is."""

    def arrive(self, *arguments: Any) -> tuple[HostInfo, str]:
        """Sets itself up; returns the id of its node as well."""
        return self.setup(*arguments), str(ray.get_runtime_context().get_node_id())


@dataclass(eq=False)
class Slot:
    """One replica, from its start to its loss.

    Attributes:
        name: Of the replica.
        actor: Its handle.
        setup: Reference to the handshake.
        started: When it was asked for, on the monotonic clock.
        info: The handshake's answer; None until it came.
        node: Id of its node, likewise.
        in_flight: Index of the unit by the reference of its result, oldest first.
        running_since: When the oldest of them became the oldest.
        leaving: It gets no more units.
        raced: Candidates of races whose models the replica keeps, less the shards.
    """

    name: str
    actor: Any
    setup: Any
    started: float
    info: HostInfo | None = None
    node: str = ""
    in_flight: dict[Any, int] = field(default_factory=dict)
    running_since: float = 0.0
    leaving: bool = False
    raced: deque[Candidate] = field(default_factory=lambda: deque(maxlen=MAX_BUILT))
    _progress: Any = None
    _reported: tuple[int, int, float] | None = None

    @staticmethod
    def start(
        name: str,
        cluster: ClusterConfig,
        shared: SharedSpec,
        published: Sequence[Any],
        strategy: Any = None,
        *,
        cpus: float | None = None,
    ) -> Slot:
        """Asks Ray for a replica, to be scheduled as Ray's own words say; doesn't wait.

        `cpus` stand in place of the cluster's.
        """
        wrap: Any = ray.remote(  # type: ignore[call-overload]  # lacks concurrency_groups
            num_cpus=cluster.cpus if cpus is None else cpus,
            num_gpus=cluster.gpus,
            resources=dict(cluster.resources) or None,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"control": 1},  # answers while a unit runs
            scheduling_strategy=strategy,  # None: in this process's placement group, if any
        )
        actor_class = wrap(OnNode)
        actor = actor_class.remote(name, cluster.gpus > 0)
        # References given as arguments arrive as values; nested in the spec they'd stay references.
        small = SharedSpec(**{**vars(shared), "structure": None, "weights": ()})
        setup = actor.arrive.remote(small, shared.structure, *published)
        return Slot(name, actor, setup, time.monotonic())

    @property
    def ready(self) -> bool:
        """Whether its handshake came."""
        return self.info is not None

    def references(self) -> list[Any]:
        """All that can finish."""
        return list(self.in_flight) if self.ready else [self.setup]

    def send(self, index: int, unit: Unit) -> None:
        """Puts a unit in flight."""
        if not self.in_flight:
            self.running_since = time.monotonic()
        self.in_flight[self.actor.run.remote(unit)] = index
        if unit.candidate.shards is not None:
            self.raced.append(replace(unit.candidate, shards=None))

    def take(self, reference: Any) -> int:
        """The index of a finished unit, which is no longer in flight."""
        self.running_since = time.monotonic()
        return self.in_flight.pop(reference)

    def abandon(self) -> None:
        """Forgets what is in flight. The replica still works it off before what comes next."""
        for reference in self.in_flight:
            ray.cancel(reference)
        self.in_flight.clear()

    def welcome(self, finished: Iterable[Any], info: HostInfo) -> str | None:
        """Looks whether a replacement's handshake came; returns why it was lost, if it was.

        Raises:
            ClusterError: It isn't like the others.
        """
        if self.setup not in finished:
            return None
        try:
            answer, self.node = ray.get(self.setup)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from error
        except ray.exceptions.RayError as error:
            return loss_reason(error)
        check_alike(self.name, answer, info)
        self.info = answer
        return None

    def overdue(self, limit: float) -> str | None:
        """Why the replica counts as hung, if a unit has taken more seconds than the limit."""
        if not self.in_flight or time.monotonic() - self.running_since < limit:
            return None
        return f"no answer within {limit:g} s (cluster.unit_timeout)"

    def poll_progress(self) -> tuple[int, int, float] | None:
        """Training progress since the last look; never waits."""
        if not self.ready or not self.in_flight:
            return None
        report = None
        if self._progress is not None:
            done, _ = ray.wait([self._progress], timeout=0)
            if not done:
                return None
            try:
                report = ray.get(self._progress)
            except ray.exceptions.RayError:
                report = None  # its loss shows in its unit
        self._progress = self.actor.progress.options(concurrency_group="control").remote()
        if report is None or report == self._reported:
            return None
        self._reported = report
        return (report[0], report[1], report[2])

    def kill(self) -> None:
        """Ends the actor's process."""
        ray.kill(self.actor, no_restart=True)


def wait_ready(
    slots: list[Slot],
    start: Callable[[], Slot],
    cluster: ClusterConfig,
    info: HostInfo | None = None,
    num: int | None = None,
) -> HostInfo:
    """Waits until replicas are up; one that dies in its start is started again, a few times.

    Args:
        slots: Changed in place.
        start: Makes a new slot.
        cluster: Says the deadline.
        info: What the replicas must be; None: what the first of them is.
        num: How many must be up; None: all.

    Raises:
        ClusterError: They aren't up in time, keep dying, or differ.
        RaycompressError: What the replica's own set-up raised.
    """
    deadline = time.monotonic() + cluster.start_timeout
    wanted = len(slots) if num is None else num
    deaths = 0
    while sum(slot.ready for slot in slots) < wanted:
        pending = [slot.setup for slot in slots if not slot.ready]
        done, _ = ray.wait(pending, timeout=max(0.0, min(1.0, deadline - time.monotonic())))
        for position, slot in enumerate(slots):
            if slot.setup not in done:
                continue
            lost = slot.welcome(done, info) if info is not None else None
            if info is None:
                try:
                    info, slot.node = ray.get(slot.setup)
                    slot.info = info
                except ray.exceptions.RayTaskError as error:
                    raise cause_of(error) from error
                except ray.exceptions.RayError as error:
                    lost = loss_reason(error)
            if lost is not None:
                deaths += 1
                if deaths >= SETUP_ATTEMPTS:
                    raise ClusterError(f"replicas die while they start: {lost}")
                slot.kill()
                slots[position] = start()
        if time.monotonic() > deadline and sum(slot.ready for slot in slots) < wanted:
            up = sum(slot.ready for slot in slots)
            asked = ", ".join(f"{v:g} {k}" for k, v in bundle(cluster).items())
            raise ClusterError(
                f"{up} of {len(slots)} replicas ({asked} each) were up after "
                f"{cluster.start_timeout:g} s (cluster.start_timeout). The cluster has "
                f"{describe()}; free now: "
                + (
                    ", ".join(
                        f"{ray.available_resources().get(k, 0):g} {k}" for k in bundle(cluster)
                    )
                )
            )
    assert info is not None
    return info


def finished(references: list[Any], seconds: float) -> list[Any]:
    """All that has finished, or, after so many seconds, the first that does."""
    done, _ = ray.wait(references, num_returns=len(references), timeout=0)
    if not done:
        done, _ = ray.wait(references, num_returns=1, timeout=seconds)
    return list(done)


def answers_of(references: list[Any]) -> dict[Any, Any]:
    """What came of finished units: results, or exceptions of Ray's."""
    try:
        return dict(zip(references, ray.get(references), strict=True))
    except ray.exceptions.RayError:
        pass  # one or more of them
    answers: dict[Any, Any] = {}
    for reference in references:
        try:
            answers[reference] = ray.get(reference)
        except ray.exceptions.RayError as error:
            answers[reference] = error
    return answers


def check_alike(name: str, got: HostInfo, wanted: HostInfo) -> None:
    """Replicas that differ would give results that differ.

    Raises:
        ClusterError: Names what differs.
    """
    ours, theirs = asdict(wanted), asdict(got)
    differing = [
        f"{key}: {theirs[key]} against {ours[key]}" for key in ours if theirs[key] != ours[key]
    ]
    if differing:
        raise ClusterError(
            f"{name} isn't like the other replicas ({'; '.join(differing)}): all need the same "
            "code, data and kind of machine"
        )
