"""What replicas are lent: parts of GPUs, resources of a cluster's own, shared memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
import ray
from conftest import FOLDER, Toy
from lending import LentReplica, lent_to

from raycompress.config import ClusterConfig
from raycompress.distributed import slots
from raycompress.distributed.pool import DEPTH, ReplicaPool
from raycompress.distributed.tune import TrialSpec, run_trials
from raycompress.errors import ClusterError
from raycompress.units import Unit


@pytest.fixture(scope="module", autouse=True)
def with_gpus() -> Iterator[None]:
    """8 CPUs, 2 GPUs that only Ray knows of, and a phone."""
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=2,
        resources={"phone": 1},
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": FOLDER}},
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "OnNode", LentReplica)


def test_four_replicas_share_two_gpus_and_one_copy_of_the_weights(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = ClusterConfig(replicas=4, cpus=0.5, gpus=0.5)
    most: Counter[str] = Counter()
    send = slots.Slot.send

    def counted(slot: slots.Slot, index: int, unit: object) -> None:
        send(slot, index, unit)  # type: ignore[arg-type]
        most[slot.name] = max(most[slot.name], len(slot.in_flight))

    monkeypatch.setattr(slots.Slot, "send", counted)
    with ReplicaPool(toy.spec(), half) as pool:
        pool.publish(toy.ranking)
        lent = ray.get([replica.probe.remote([]) for replica in pool.replicas])
        assert Counter(gpu for each in lent for gpu in each["gpus"]) == {"0": 2, "1": 2}
        assert all(each["resources"]["GPU"] == 0.5 and each["asked"] for each in lent)
        # Every tensor of every replica lies in memory that the node's processes share.
        assert all(each["shared"] and all(each["shared"]) for each in lent)
        asked = [toy.candidate(1 + i % 15, recalibrate=i // 15) for i in range(60)]
        trials = pool.evaluate(asked)
        assert all(trial.failure is None for trial in trials)
        # Back-pressure: with 60 units to do, no replica had more than these before it.
        assert max(most.values()) == DEPTH
        # Nor do ten thousand wait with Ray; who gives up leaves none there.
        units = [Unit(toy.candidate(1 + i % 15), shards=(i % 4,)) for i in range(10_000)]
        running = pool._run(units)
        for _ in itertools.islice(running, 100):
            assert sum(len(slot.in_flight) for slot in pool._working) <= DEPTH * half.replicas
        running.close()
        assert not any(slot.in_flight for slot in pool._working)
    too_many = ClusterConfig(replicas=5, cpus=0.5, gpus=0.5)
    with pytest.raises(ClusterError, match=r"they need 2\.5 GPU in all, the cluster has 2"):
        ReplicaPool(toy.spec(), too_many)


def test_a_replica_stands_at_the_target_device(toy: Toy) -> None:
    one = ClusterConfig(replicas=1, cpus=0.5, resources={"phone": 1})
    with ReplicaPool(toy.spec(), one) as pool:
        lent = ray.get(pool.replicas[0].probe.remote([]))
        assert lent["resources"]["phone"] == 1 and lent["gpus"] == []
        assert ray.available_resources().get("phone", 0) == 0
    with pytest.raises(ClusterError, match=r"they need 2 phone in all, the cluster has 1"):
        ReplicaPool(toy.spec(), ClusterConfig(replicas=2, cpus=0.5, resources={"phone": 1}))


@pytest.mark.slow
def test_two_trials_share_one_gpu(toy: Toy) -> None:
    other = ray.util.placement_group([{"GPU": 1}])  # the other one is somebody else's
    assert other.wait(60)
    half = ClusterConfig(replicas=1, cpus=0.5, gpus=0.5)
    specs = [
        TrialSpec(name, {"name": name, "folder": str(toy.folder), "num_trials": 2})
        for name in ("one", "two")
    ]
    job = toy.folder / "job"
    results, failures = run_trials(specs, "lending:run_lent_trial", toy.spec(), half, job, lent_to)
    ray.util.remove_placement_group(other)
    assert failures == {}
    assert results["one"] == results["two"]  # and each waited until both had it
    ((gpu,),) = results["one"]["gpus"]
    assert gpu in ("0", "1")
