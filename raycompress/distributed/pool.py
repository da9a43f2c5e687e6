"""The executor on Ray: replica actors, and the loop that keeps them busy and survives their loss.

Results don't depend on how many replicas there are, in what order they answer, or which of them
are lost: a unit carries all that it needs, and whoever answers, its sums are the same.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raycompress.candidate import Candidate, Ranking
from raycompress.config import ClusterConfig
from raycompress.distributed.cluster import bundle, reserve
from raycompress.distributed.extras import Extras
from raycompress.distributed.losses import UNREACHABLE, advised, loss_reason, named, on_living_nodes
from raycompress.distributed.meter import Meter
from raycompress.distributed.slots import Slot, answers_of, finished, wait_ready
from raycompress.distributed.spec import PackedWeights, PoolSpec, SharedSpec
from raycompress.distributed.waiting import Waiting
from raycompress.errors import EvaluationError, RaycompressError, StorageError
from raycompress.executor import LedgerExecutor
from raycompress.ledger import Ledger
from raycompress.storage import Place
from raycompress.structure.latency.measure import LatencyRow
from raycompress.structure.latency.table import LatencyTable
from raycompress.task import Progress
from raycompress.units import HostInfo, Unit, UnitResult, lacks_memory
from raycompress.weights import Weights, WeightStore

__all__ = ["ReplicaPool"]

_log = logging.getLogger(__name__)

DEPTH = 2
"""Units in flight for each replica: one runs, the next is there when it ends."""

MAX_LOSSES = 3
"""A unit that was running in this many replicas when they were lost counts as the cause."""

Losses = defaultdict[int, list[str]]
"""For each unit the replicas that were lost while it ran: "", or the node of one that may have been
lost with its node."""

POLL_SECONDS = 0.5
"""How often deadlines and training progress are looked at while nothing finishes."""


class ReplicaPool(LedgerExecutor):
    """Runs units on replica actors; a context manager that ends them.

    Inside a Tune trial the actors land in the trial's placement group, elsewhere in one of the
    pool's own: they get their room together, so that two jobs never hold a part of it each and wait
    for the other's. Where other jobs hold it, a pool waits as long as they do.

    Args:
        spec: What the replicas host.
        cluster: How many there are, what each takes, and the deadlines.
        ledger: Where finished work is recorded; None keeps it in memory.
        progress: Called with (step, number of steps, loss) while a training unit runs.
        target: Ray resources of one more replica, which measures latency and does nothing else;
            it starts when it is asked to. CPU and GPU are as in `cluster` where they aren't given.
            In a trial it goes when it has measured, since others may wait for the device. Empty:
            any of the others measures.
        reserved: Its resources are set aside already, by a placement group.

    Raises:
        ClusterError: The cluster can't host the replicas, they weren't up in time, or they differ.
        TaskError: The task can't be made in a replica.
    """

    def __init__(
        self,
        spec: PoolSpec | SharedSpec,
        cluster: ClusterConfig | None = None,
        *,
        ledger: Ledger | None = None,
        progress: Progress | None = None,
        target: Mapping[str, float] | None = None,
        reserved: bool = False,
    ) -> None:
        cluster = cluster if cluster is not None else ClusterConfig()
        shared = spec.share() if isinstance(spec, PoolSpec) else spec
        structure = spec.structure if isinstance(spec, PoolSpec) else ray.get(shared.structure)
        super().__init__(structure, WeightStore(shared.store), shared.evaluation, ledger, progress)
        self.cluster = cluster
        self.num_lost = 0
        self._shared = shared
        self._target = dict(target or {})
        self._meter = Meter(cluster, target, trial=reserved) if target else None
        self._lends_meter = reserved
        self._published: list[Any] = list(shared.weights)
        self._num_started = 0
        self._polled = 0.0
        self._room = None
        if not reserved:
            asked = [bundle(cluster)] * cluster.replicas
            self._room = reserve(asked, f"{cluster.replicas} replicas", cluster.start_timeout)
        self._slots: list[Slot] = []
        self._extras = Extras(
            cluster.extra_replicas,
            bundle(cluster),
            lambda: self._start("SPREAD"),
            cluster.start_timeout,
        )
        try:
            for _ in range(cluster.replicas):
                self._slots.append(self._start())
            self._info = wait_ready(self._slots, self._start, cluster)
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        """Replicas that the job asked for."""
        return self.cluster.replicas

    @property
    def info(self) -> HostInfo:
        """What the hosts are; the same for all of them."""
        return self._info

    @property
    def timing_place(self) -> Mapping[str, float]:
        """The target device's resources."""
        return self._target

    @property
    def replicas(self) -> list[Any]:
        """Handles of the replicas' actors, as they are now."""
        return [slot.actor for slot in self._working]

    @property
    def _working(self) -> list[Slot]:
        """Reserved ones, and the extra ones that are up."""
        return [*self._slots, *(slot for slot in self._extras.slots if slot.ready)]

    def _share(self, digest: str, weights: Weights) -> None:
        # Into the object store once, for all replicas and their replacements.
        self._broadcast(ray.put(PackedWeights.pack(digest, weights)))

    def latency(
        self,
        candidates: Mapping[str, Candidate],
        batch_sizes: Sequence[int],
        repeats: int,
        max_seconds: float | None = None,
        runtime: str = "",
    ) -> list[LatencyRow]:
        """Measures candidates against each other on one replica; the others stand idle.

        Raises:
            EvaluationError: The replica was lost, or took too long, or lacked memory, `MAX_LOSSES`
                times; or the model raised.
        """
        arguments = (dict(candidates), tuple(batch_sizes), repeats, max_seconds, runtime)
        models = max(len(candidates), 1) if runtime else 1
        rows: list[LatencyRow] = self._alone("latency", arguments, max_seconds, models)
        return rows

    def latency_table(
        self, batch_size: int = 1, folder: str | Place | None = None, max_seconds: float = 300.0
    ) -> LatencyTable:
        """The model's latency table, measured on one replica; the others stand idle.

        Raises:
            EvaluationError: Likewise.
        """
        arguments = (batch_size, folder, max_seconds)
        table: LatencyTable = self._alone("latency_table", arguments, max_seconds)
        return table

    def _alone(
        self, method: str, arguments: tuple[Any, ...], max_seconds: float | None, models: int = 1
    ) -> Any:
        """Calls one replica, and another one where that is lost.

        A measurement runs over its time by at most what was under way at the end of it, which
        `cluster.unit_timeout` bounds as it does any unit; so it does each of the models that are
        lowered before.
        """
        try:
            return self._asked(method, arguments, max_seconds, models)
        finally:
            if self._lends_meter and self._meter is not None:
                self._meter.close()

    def _asked(
        self, method: str, arguments: tuple[Any, ...], max_seconds: float | None, models: int
    ) -> Any:
        timeout = self.cluster.unit_timeout
        if timeout is not None:
            timeout = None if max_seconds is None else models * timeout + max_seconds
        reason = ""
        for _ in range(MAX_LOSSES):
            slot = self._measuring()
            try:
                return ray.get(getattr(slot.actor, method).remote(*arguments), timeout=timeout)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RaycompressError):
                    raise error.cause from error
                reason = f"{type(error.cause).__name__}: {error.cause}"
                if not lacks_memory(error.cause):
                    raise EvaluationError(f"{method} failed: {reason}") from error
            except ray.exceptions.GetTimeoutError:
                reason = f"it measured for more than {timeout:g} s"
            except ray.exceptions.RayError as error:
                reason = loss_reason(error)
            self._replace(slot, reason)
        raise EvaluationError(f"{method} lost its replica {MAX_LOSSES} times: {advised(reason)}")

    def close(self) -> None:
        """Ends the replicas."""
        self._extras.close()
        for slot in self._slots:
            slot.kill()
        if self._meter is not None:
            self._meter.close()
        self._slots, self._meter = [], None
        if self._room is not None:
            ray.util.remove_placement_group(self._room)
            self._room = None

    def _publish(self, ranking: Ranking) -> None:
        self._broadcast(ray.put(ranking))

    def _broadcast(self, reference: Any) -> None:
        self._published.append(reference)
        acks = {}
        for slot in [*self._own(), *self._extras.slots]:
            ack = slot.actor.publish.remote(reference)
            if slot.ready:  # who still starts is told next, before any unit
                acks[ack] = slot
        timeout = self.cluster.start_timeout
        _, late = ray.wait(list(acks), num_returns=len(acks), timeout=timeout) if acks else ([], [])
        for ack, slot in acks.items():
            if ack in late:
                self._replace(slot, f"it didn't answer within {timeout:g} s")
                continue
            try:
                ray.get(ack)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                self._replace(slot, loss_reason(error))

    def _start(self, strategy: Any = None) -> Slot:
        name = f"replica-{self._num_started}"
        self._num_started += 1
        if strategy is None and self._room is not None:
            strategy = PlacementGroupSchedulingStrategy(self._room)
        return Slot.start(name, self.cluster, self._shared, self._published, strategy)

    def _own(self) -> list[Slot]:
        """All that aren't extra."""
        meter = self._meter.slot if self._meter is not None else None
        return self._slots if meter is None else [*self._slots, meter]

    def _measuring(self) -> Slot:
        """The replica that measures latency."""
        if self._meter is None:
            return self._any_ready()
        return self._meter.ready(self._shared, self._published, self._info)

    def _replace(self, slot: Slot, reason: str) -> None:
        """Puts a new replica where one was lost; an extra one only goes."""
        if slot in self._extras.slots:
            self.num_lost += 1
            self._extras.drop(slot, reason)
            return
        _log.warning("%s is replaced: %s", slot.name, reason)
        slot.kill()
        self.num_lost += 1
        if self._meter is not None and slot is self._meter.slot:
            self._meter.slot = None
            return
        self._slots[self._slots.index(slot)] = self._start()

    def _any_ready(self) -> Slot:
        if not any(slot.ready for slot in self._slots):
            wait_ready(self._slots, self._start, self.cluster, self._info, num=1)
        return next(slot for slot in self._slots if slot.ready)

    def _run(self, units: Sequence[Unit]) -> Iterator[tuple[int, UnitResult]]:
        waiting = Waiting(units)
        losses: Losses = defaultdict(list)
        left = len(units)
        try:
            while left:
                self._fill(units, waiting, losses)
                for index, result in self._collect(waiting, losses):
                    left -= 1
                    if result.again:
                        failure = f"EvaluationError: {named(units[index])} {result.failure}"
                        result = replace(result, failure=failure)
                    yield index, result
                self._extras.look(len(waiting), self._info)
        finally:
            for slot in self._working:
                if slot.in_flight:  # the caller gave up: nobody wants these answers
                    slot.abandon()

    def _fill(self, units: Sequence[Unit], waiting: Waiting, losses: Losses) -> None:
        """Sends waiting units, level by level, so that no replica takes two while one has none."""
        free = [
            slot
            for slot in self._working
            if slot.info is not None and not slot.leaving and len(slot.in_flight) < DEPTH
        ]
        for depth in range(DEPTH):
            for slot in free:
                if not waiting:
                    return
                if len(slot.in_flight) != depth:
                    continue
                # A unit that was there when a replica was lost runs alone, so that no other
                # is blamed for what it does.
                index = waiting.next_of(slot.raced)
                suspect = bool(losses.get(index))
                if depth and (suspect or any(losses.get(i) for i in slot.in_flight.values())):
                    continue
                waiting.remove(index)
                slot.send(index, units[index])

    def _collect(self, waiting: Waiting, losses: Losses) -> Iterator[tuple[int, UnitResult]]:
        """What has finished; waits for it for at most `POLL_SECONDS`."""
        owners = {ref: slot for slot in self._working for ref in slot.references()}
        done = finished(list(owners), POLL_SECONDS)
        answers = answers_of([ref for ref in done if owners[ref].ready])
        lost: dict[Slot, str] = {}
        for reference in done:
            slot = owners[reference]
            if slot in lost:
                continue
            if not slot.ready:
                reason = slot.welcome(done, self._info)
                if reason is not None:
                    lost[slot] = reason
                continue
            result = answers[reference]
            if isinstance(result, ray.exceptions.RayTaskError):
                if isinstance(result.cause, StorageError):
                    raise result.cause
                result = UnitResult(failure=loss_reason(result), worker=slot.name)
            elif isinstance(result, Exception):
                lost[slot] = loss_reason(result)
                continue
            elif result.again:  # another process has more room, perhaps on another node
                lost[slot] = str(result.failure)
                continue
            yield slot.take(reference), result
        if self.cluster.unit_timeout is not None:
            for slot in self._working:
                reason = slot.overdue(self.cluster.unit_timeout)
                if reason is not None:
                    lost.setdefault(slot, reason)
        for slot, reason in lost.items():
            yield from self._lose(slot, reason, waiting, losses)
        if self.progress is not None and time.monotonic() - self._polled > POLL_SECONDS:
            self._polled = time.monotonic()
            for slot in self._working:
                report = slot.poll_progress()
                if report is not None:
                    self.progress(*report)
        if not any(slot.ready for slot in self._working):
            wait_ready(self._slots, self._start, self.cluster, self._info, num=1)

    def _lose(
        self, slot: Slot, reason: str, waiting: Waiting, losses: Losses
    ) -> Iterator[tuple[int, UnitResult]]:
        """Replaces a replica; its running unit is charged, the one behind it is not.

        Nor is any with the loss of a whole node, of which there may be any number in a long job.
        """
        indices = list(slot.in_flight.values())
        self._replace(slot, reason)
        for position, index in enumerate(indices):
            if position == 0:
                losses[index].append(slot.node if reason == UNREACHABLE else "")
            if len(losses[index]) >= MAX_LOSSES:
                losses[index] = on_living_nodes(losses[index], MAX_LOSSES)
            if len(losses[index]) < MAX_LOSSES:
                # Behind the others if it may be the cause: the search goes on meanwhile.
                waiting.put_back(index, last=position == 0)
                continue
            failure = f"lost its replica {MAX_LOSSES} times: {advised(reason)}"
            yield index, UnitResult(failure=failure, worker=slot.name, again=True)
