"""Kills that provably land in mid-work, and the check that nothing is done twice.

A victim is frozen first (SIGSTOP). Only if the task's books (`chaos_task`) then say that a unit is
under way, in the victim itself or in a replica that works for it, it is killed (SIGKILL); else it
goes on, and another moment is tried.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from raycompress.ledger import read_ledger
from tests.distributed.chaos_task import Event, work_of

PATIENCE = 300.0
"""Seconds that a killer waits for its moment."""


def events(log: Path) -> list[Event]:
    """The side file's lines, in the order of writing."""
    if not log.exists():
        return []
    lines = log.read_text().split("\n")[:-1]  # without what is being written
    return [Event(w, p, t, u, tuple(s)) for w, p, t, u, s in map(json.loads, lines)]


def working(log: Path) -> dict[int, Event]:
    """What each process is inside of, by its id; those that are between units aren't there."""
    last = {event.pid: event for event in events(log)}
    return {pid: event for pid, event in last.items() if event.what == "begun" and alive(pid)}


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return _state(pid) not in ("", "Z", "X")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def below(pid: int) -> list[int]:
    """Processes that a process started, and theirs."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(parent, []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def freeze(pids: Iterable[int]) -> list[int]:
    """Stops processes; returns those that stand still."""
    stopped = []
    for pid in pids:
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            continue
        while alive(pid) and _state(pid) != "T":
            time.sleep(0.0005)
        stopped.append(pid)
    return stopped


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Sends a signal to those that are still there."""
    for pid in pids:
        if alive(pid):
            os.kill(pid, number)


@dataclass
class Strike:
    """A kill that happened.

    Attributes:
        pids: Who was killed.
        time: When.
        inside: The units that were begun and not ended then, by process.
        finished: Work that the ledger held.
        alone: Only what the killed processes did is lost; else whatever was in flight.
    """

    pids: list[int]
    time: float
    inside: dict[int, Event]
    finished: Counter[str]
    alone: bool = True

    @property
    def killed(self) -> list[Event]:
        """What the killed processes were inside of."""
        return [event for pid, event in self.inside.items() if pid in self.pids]

    def in_flight(self, lines: Iterable[Event]) -> Counter[Any]:
        """Units that were begun by those who were lost, and hadn't reached the ledger."""
        return Counter(
            event.unit
            for event in lines
            if event.what == "begun"
            and event.time < self.time
            and not self.finished[event.work]
            and (event.pid in self.pids or not self.alone)
        )


Victims = Callable[[list[int], random.Random], list[int]]
"""Whom to kill, given those that are inside a unit; nobody: not now."""


def one_replica(busy: list[int], rng: random.Random) -> list[int]:
    """Any of those at work."""
    return [rng.choice(busy)] if busy else []


def the_trial(busy: list[int], rng: random.Random) -> list[int]:
    """The process of a Tune trial, while its replicas are at work."""
    return [pid for pid in below(os.getpid()) if b"ImplicitFunc" in _title(pid)] if busy else []


class Nodes:
    """A cluster on this machine: a head without CPUs, and nodes that can be killed whole.

    Args:
        num: Nodes.
        cpus: Logical CPUs of each.
    """

    def __init__(self, num: int, cpus: int) -> None:
        self.num, self.cpus = num, cpus
        # A node that answers nothing any more counts as lost after 2.5 s instead of 15.
        sooner = {"health_check_period_ms": 500}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": sooner}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.restore()
        self.address = self.cluster.address

    def restore(self, num: int | None = None) -> None:
        """Puts new nodes where some were killed, and takes away what is more than `num`."""
        num = self.num if num is None else num
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: alive(_raylet(node)))
        for node in nodes:
            if not alive(_raylet(node)) or len(self.cluster.worker_nodes) > num:
                self.cluster.remove_node(node)
        while len(self.cluster.worker_nodes) < num:
            self.cluster.add_node(num_cpus=self.cpus)

    def one(self, busy: list[int], rng: random.Random) -> list[int]:
        """All processes of a node on which someone is at work."""
        trees = [[_raylet(n), *below(_raylet(n))] for n in self.cluster.worker_nodes]
        trees = sorted(tree for tree in trees if set(tree) & set(busy))
        return rng.choice(trees) if trees else []


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


class Killer(threading.Thread):
    """Strikes at random moments while the test's own thread runs a job.

    Args:
        log: The side file.
        output: Of the job.
        moments: Strikes after so many units have begun.
        rng: Draws how long after, and the victims.
        victims: Chooses them.
        alone: They are the replicas themselves, one of which must be inside a unit; else any
            process that works with replicas, one of which must be.
    """

    def __init__(
        self,
        log: Path,
        output: Path,
        moments: list[int],
        rng: random.Random,
        victims: Victims = one_replica,
        *,
        alone: bool = True,
    ) -> None:
        super().__init__(daemon=True)
        self.log, self.output, self.moments, self.rng = log, output, moments, rng
        self.victims, self.alone = victims, alone
        self.strikes: list[Strike] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        """One strike for each moment."""
        try:
            for moment in self.moments:
                self.strikes.append(self.strike(moment))
        except BaseException as error:
            self.error = error

    def strike(self, after: int) -> Strike:
        """Kills once."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if sum(event.what == "begun" for event in events(self.log)) <= after:
                time.sleep(0.01)
                continue
            time.sleep(self.rng.uniform(0.0, 0.1))
            pids = freeze(self.victims(sorted(working(self.log)), self.rng))
            found = Strike(
                pids, time.monotonic(), working(self.log), recorded(self.output), self.alone
            )
            if pids and (found.killed if self.alone else found.inside):
                send(pids, signal.SIGKILL)
                return found
            send(pids, signal.SIGCONT)
        raise AssertionError(f"no moment to kill came: {len(events(self.log))} lines in {self.log}")

    def done(self) -> list[Strike]:
        """All strikes, each of which fell while a unit was under way."""
        self.join(PATIENCE)
        if self.error is not None:
            raise self.error
        assert len(self.strikes) == len(self.moments), "the job ended before its last kill"
        return self.strikes


def records(output: Path) -> dict[str, tuple[Any, ...]]:
    """What a ledger says, by key; worker and seconds aside."""
    found: dict[str, tuple[Any, ...]] = {}
    for r in read_ledger(output / "ledger"):
        value = (r["kind"], r["split"], r["shards"], r["failure"], r["weights"], r["dfe"])
        assert found.setdefault(r["key"], value) == value, "two answers to one question"
    return found


def recorded(output: Path) -> Counter[str]:
    """Finished work, and how many parts of the ledger hold it."""
    found: Counter[str] = Counter()
    for part in sorted((output / "ledger").glob("*.jsonl")):
        lines = [json.loads(line) for line in part.read_text().split("\n")[:-1]]
        assert len(lines) == len({r["key"] for r in lines}), f"{part.name} holds a key twice"
        found.update(work_of(r["candidate"], r["split"], r["kind"]) for r in lines)
    return found


def check_books(log: Path, output: Path, strikes: list[Strike]) -> int:
    """What was begun is in the ledger, and once, but for what was in flight at a kill.

    Trials that run beside each other may ask the same, each for itself.

    Args:
        log: The side file.
        output: Holds the ledger.
        strikes: All kills.

    Returns:
        How many units were begun once more.
    """
    lines, finished = events(log), recorded(output)
    begun = Counter(event.unit for event in lines if event.what == "begun")
    excused: Counter[Any] = sum((each.in_flight(lines) for each in strikes), Counter())
    again = 0
    for (work, shards), num in begun.items():
        assert finished[work], f"no ledger holds {work}"
        extra = num - finished[work]
        assert extra <= excused[work, shards], f"{work} was done {num} times"
        again += max(extra, 0)
    return again
