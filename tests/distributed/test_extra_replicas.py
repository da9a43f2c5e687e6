"""Nodes that join: replicas beyond the reserved ones, in mid-search, and target devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from conftest import Toy
from ray.cluster_utils import Cluster

from raycompress.candidate import Candidate, Trial
from raycompress.config import ClusterConfig
from raycompress.distributed import extras
from raycompress.distributed.pool import ReplicaPool
from raycompress.errors import ClusterError
from raycompress.ledger import Ledger, read_ledger
from raycompress.quantization import PTQ, Quantization
from raycompress.quantization.quantizer import Bits
from raycompress.search import Search, Timings, run_search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def growing() -> Iterator[Cluster]:
    """One node with room for one replica."""
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def until(what: Callable[[], bool], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_extra_replicas_come_with_a_node_and_go_when_asked_and_with_it(
    toy: Toy, growing: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "REST_SECONDS", 4.0)

    def search(lasts: Callable[[int], bool]) -> Search:
        """Six new candidates a step, around the best so far, which wins."""
        best, number = Trial(toy.candidate(10)), 0
        while lasts(number):
            start = max(best.candidate.counts["conv3"] - 3, 1)
            number += 1
            trials = yield [toy.candidate(start + i, recalibrate=number) for i in range(6)]
            best = min([best, *trials], key=lambda trial: trial.loss)
        return best.candidate

    spec = toy.spec("ray_tasks:SignallingTask", folder=str(toy.folder), each=0.25)
    found: list[Sequence[Trial]] = []
    winners: list[Candidate] = []
    errors: list[BaseException] = []
    with (
        Ledger(toy.folder / "ledger", "a") as ledger,
        ReplicaPool(
            spec, ClusterConfig(replicas=1, extra_replicas=2, cpus=1), ledger=ledger
        ) as pool,
    ):
        pool.publish(toy.ranking)
        ended = threading.Event()

        def run() -> None:
            own = search(lambda number: not ended.is_set())
            try:
                winners.append(run_search(own, pool, lambda _, trials: found.append(trials)))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            until(lambda: bool(found))
            assert len(pool.replicas) == 1  # no room for more

            node = growing.add_node(num_cpus=2, object_store_memory=100_000_000)
            until(lambda: len(pool.replicas) == 3 or bool(errors))

            group = ray.util.placement_group([{"CPU": 2}])
            assert group.wait(60)  # its room was given back
            assert len(pool.replicas) == 1
            ray.util.remove_placement_group(group)

            until(lambda: len(pool.replicas) == 3 or bool(errors))
            growing.remove_node(node, allow_graceful=False)
            until(lambda: len(pool.replicas) == 1 or bool(errors))
        finally:
            ended.set()
            thread.join(300)
    assert not errors and not thread.is_alive()
    # As many steps in one process: each step's candidates hang on the scores before it.
    expected: list[Sequence[Trial]] = []
    alone = search(lambda number: number < len(found))
    winner = run_search(alone, toy.local(), lambda _, trials: expected.append(trials))
    assert winners == [winner]
    assert [[(t.candidate, t.shards) for t in step] for step in found] == [
        [(t.candidate, t.shards) for t in step] for step in expected
    ]
    assert all(trial.shards for step in found for trial in step)
    # A pool without them says the same of itself: extra ones did work.
    records = read_ledger(toy.folder / "ledger")
    assert len({record["worker"] for record in records}) >= 3


def test_latency_is_measured_at_the_target_device(toy: Toy, growing: Cluster) -> None:
    memory = 100_000_000
    growing.add_node(num_cpus=4, object_store_memory=memory)
    phone = growing.add_node(num_cpus=1, resources={"phone": 1}, object_store_memory=memory)
    growing.wait_for_nodes()
    two_cores = ClusterConfig(replicas=1, cpus=2)  # not on the phone, which has one
    with ReplicaPool(toy.spec(), two_cores, target={"phone": 1, "CPU": 1}) as pool:
        rows = pool.latency({"dense": Candidate(toy.digest)}, (1, 2), 3)
        assert [(row.batch_size, row.repeats) for row in rows] == [(1, 3), (2, 3)]
        assert pool._meter is not None and pool._meter.slot is not None
        assert pool._meter.slot.node == phone.node_id
        assert [slot.node == phone.node_id for slot in pool._slots] == [False]
        ray.kill(pool._meter.slot.actor)
        pool.publish(toy.ranking)  # the one that measures is told, too, and its loss is noticed
        rows = pool.latency({"dense": Candidate(toy.digest), "slim": toy.candidate(3)}, (1,), 3)
        assert len(rows) == 2 and pool.num_lost == 1
        assert pool._meter.slot.node == phone.node_id
    bits = dict.fromkeys(("conv1", "conv2"), Bits(weight=8, input=8))
    asked = Candidate(toy.digest, quantize=Quantization.of(PTQ(), bits))
    target = {"phone": 0.9, "CPU": 1}
    there = ClusterConfig(replicas=1, cpus=1, resources={"phone": 0.001})  # on the phone's only CPU
    with (
        ReplicaPool(toy.spec(), there, target=target, reserved=True) as one,
        ReplicaPool(toy.spec(), two_cores, target=target, reserved=True) as two,
        ThreadPoolExecutor(2) as both,
    ):
        # Two trials and one device: the second waits, and has it when the first has measured.
        found = list(both.map(lambda trial: trial.timed(Timings((asked,), "onnx"))[0], (one, two)))
        for trial, timed in zip((one, two), found, strict=True):
            assert timed.failure is None and 0 < timed.latency_ms and 0 < timed.float_ms
            assert trial._meter is not None and trial._meter.slot is None and trial.num_lost == 0
            assert trial.timed(Timings((asked,), "onnx"))[0].replayed
    with pytest.raises(
        ClusterError, match=r"measures latency doesn't fit \(latency.resources\): no"
    ):
        ReplicaPool(toy.spec(), two_cores, target={"phone": 2})
