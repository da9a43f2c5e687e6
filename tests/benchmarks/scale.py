"""Many light replicas on a simulated cluster of many nodes: how well dispatch keeps them busy.

    python tests/benchmarks/scale.py [--replicas 1 2 4 8 16 32 64] [--seconds 6] [--ledger FOLDER]

Each evaluation sleeps 50 ms, so that one machine can play a large cluster: its nodes are processes
with 16 logical CPUs each (`ray.cluster_utils.Cluster`). Efficiency is sleep alone over (replicas x
wall time): all else that replicas and driver do counts as loss; "busy" counts what replicas say
that they worked (building the candidate as well). "bare" are Ray actors that sleep the
same, and a loop that sends one the next item when its last one is done; "bare, 2 each" keeps two in
flight for each actor. "pool" is `ReplicaPool` with a durable ledger. CPU is the driver's process,
all threads; 1000 over it is the rate at which the driver would be busy all the time. "All" is the
CPU of driver, replicas and Ray's own processes: 1000 over it, times the machine's cores, is the
rate beyond which the simulation itself is what saturates.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from torch import nn
from torch.utils.data import TensorDataset

from raycompress.candidate import Candidate, Trial
from raycompress.config import ClusterConfig
from raycompress.distributed.pool import ReplicaPool
from raycompress.distributed.spec import PoolSpec
from raycompress.ledger import Ledger
from raycompress.structure import analyze
from raycompress.task import Split, Task
from raycompress.weights import Weights, WeightStore

SLEEP = 0.05
CPUS_PER_NODE = 16
Measured = tuple[float, float, float]
"""Wall seconds, the driver's CPU seconds, and those of all processes."""


class SleepingTask(Task):
    """A model of one layer, whose evaluation sleeps."""

    def build_model(self) -> nn.Module:
        """The same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Linear(4, 2)

    def dataset(self, split: Split) -> TensorDataset:
        """One example."""
        return TensorDataset(torch.zeros(1, 4), torch.zeros(1))

    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """Two examples."""
        return (torch.zeros(2, 4),)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Never asked for."""
        raise NotImplementedError

    def score(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Never asked for."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """Sleeps."""
        time.sleep(SLEEP)
        return 0.5


class Sleeper:
    """What a bare actor does."""

    def run(self, item: int) -> int:
        """Sleeps."""
        time.sleep(SLEEP)
        return item


@contextmanager
def nodes(num: int) -> Iterator[None]:
    """A head without CPUs and so many nodes, on this machine."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(num):
            cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=100_000_000)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def timed(work: Callable[[], object]) -> Measured:
    """Runs it."""
    start, cpu, everything = time.perf_counter(), time.process_time(), cpu_of_all()
    work()
    wall, own = time.perf_counter() - start, time.process_time() - cpu
    return wall, own, cpu_of_all() - everything


def cpu_of_all() -> float:
    """CPU seconds of this process and of all below it that live."""
    children: dict[int, list[int]] = defaultdict(list)
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            numbers = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            children[int(numbers[1])].append(pid)
            ticks[pid] = int(numbers[11]) + int(numbers[12])
    found = [os.getpid()]
    for pid in found:
        found += children[pid]
    return sum(ticks[pid] for pid in found) / os.sysconf("SC_CLK_TCK")


def bare(replicas: int, num: int, depth: int) -> Measured:
    """Bare actors and a plain loop over what has finished."""
    actors = [ray.remote(num_cpus=1)(Sleeper).remote() for _ in range(replicas)]
    ray.get([actor.run.remote(0) for actor in actors])

    def work() -> None:
        items = iter(range(num))
        running = {}
        for _ in range(depth):
            for actor, item in zip(actors, items, strict=False):
                running[actor.run.remote(item)] = actor
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor = running.pop(done)
            ray.get(done)
            item = next(items, None)
            if item is not None:
                running[actor.run.remote(item)] = actor

    measured = timed(work)
    for actor in actors:
        ray.kill(actor)
    return measured


def pool(replicas: int, num: int, folder: Path) -> tuple[Measured, float, float]:
    """A pool with a durable ledger; also seconds of work in it, and a replica's memory in MiB."""
    task = SleepingTask()
    model = task.build_model().eval()
    weights = Weights(model.state_dict(), {})
    digest = WeightStore(folder / "weights").put(weights)
    spec = PoolSpec(
        task="scale:SleepingTask",
        structure=analyze(model, task.example_inputs()),
        store=str(folder / "weights"),
        weights={digest: weights},
        import_paths=(str(Path(__file__).parent),),
    )
    cluster = ClusterConfig(replicas=replicas, start_timeout=600)
    with (
        Ledger(folder / f"ledger-{replicas}", "a") as ledger,
        ReplicaPool(spec, cluster, ledger=ledger) as executor,
    ):
        warm = [Candidate(digest, recalibrate=1 + i) for i in range(2 * replicas)]
        executor.evaluate(warm)
        asked = [Candidate(digest, recalibrate=1000 + i) for i in range(num)]
        trials: list[Trial] = []
        measured = timed(lambda: trials.extend(executor.evaluate(asked)))
        assert executor.num_lost == 0 and len(ledger) == num + len(warm)
        assert all(trial.score == 0.5 for trial in trials)
        pids = [probe["pid"] for probe in ray.get([r.probe.remote([]) for r in executor.replicas])]
        memory = max(resident(pid) for pid in pids)
    return measured, sum(trial.seconds for trial in trials), memory


def resident(pid: int) -> float:
    """Private memory of a process in MiB: what one more of it takes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return sum(private) / 1024


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=6.0, help="of sleep for each replica")
    parser.add_argument("--ledger", type=Path, help="a folder on the disk to be measured")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    print(f"{os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}", flush=True)
    print(
        "| replicas | bare, % | bare, 2 each, % | pool, % | pool, busy, % | bare CPU, ms a unit | "
        "pool CPU, ms a unit | bare, all, ms a unit | pool, all, ms a unit | "
        "private memory of a replica, MiB |\n|" + "---|" * 10,
        flush=True,
    )
    with (
        tempfile.TemporaryDirectory(dir=args.ledger) as folder,
        nodes(-(-max(args.replicas) // CPUS_PER_NODE)),
    ):
        for replicas in args.replicas:
            num = int(args.seconds / SLEEP) * replicas
            one, two = bare(replicas, num, 1), bare(replicas, num, 2)
            ours, busy, memory = pool(replicas, num, Path(folder))
            shares = [100 * num * SLEEP / (replicas * wall) for wall, *_ in (one, two, ours)]
            shares.append(100 * busy / (replicas * ours[0]))
            cpus = [1e3 * measured[i] / num for i in (1, 2) for measured in (one, ours)]
            figures = [*(f"{share:.1f}" for share in shares), *(f"{cpu:.2f}" for cpu in cpus)]
            print(f"| {replicas} | " + " | ".join(figures) + f" | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
