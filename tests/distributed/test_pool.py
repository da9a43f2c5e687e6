from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest
import ray
import torch
from conftest import Toy, wait_for
from ray_tasks import SignallingTask

from raycompress.candidate import Candidate, Ranking, Training, Trial, digest_of
from raycompress.config import ClusterConfig
from raycompress.distributed import cluster as cluster_module
from raycompress.distributed.pool import ReplicaPool
from raycompress.distributed.replica import Replica
from raycompress.distributed.slots import check_alike
from raycompress.distributed.spec import PackedWeights
from raycompress.errors import ClusterError, TaskError
from raycompress.ledger import Ledger
from raycompress.units import HostInfo
from raycompress.weights import Weights, digest_of_state

pytestmark = pytest.mark.usefixtures("cluster")
Few = Callable[..., ClusterConfig]


def answers(trials: list[Trial]) -> list[object]:
    return [(t.candidate, t.shards, t.failure, t.weights) for t in trials]


def test_any_number_of_replicas_answers_as_the_local_executor(toy: Toy, few: Few) -> None:
    asked = [toy.candidate(count) for count in (1, 3, 5, 8, 12, 16)]
    asked.append(toy.candidate(6, recalibrate=2))
    asked.append(toy.candidate(6, training=Training(epochs=1)))
    with Ledger(toy.folder / "ledger-local", "a") as ledger:
        expected = toy.local(ledger=ledger).evaluate(asked)
        keys = set(ledger._known)
    assert all(trial.failure is None for trial in expected)
    for replicas in (1, 3):
        with (
            Ledger(toy.folder / f"ledger-{replicas}", "a") as ledger,
            ReplicaPool(toy.spec(), few(replicas), ledger=ledger) as pool,
        ):
            pool.publish(toy.ranking)
            assert answers(pool.evaluate(asked)) == answers(expected)
            # One candidate alone is cut into shards for all replicas.
            alone = pool.evaluate([toy.candidate(2)])
            assert answers(alone) == answers(toy.local().evaluate([toy.candidate(2)]))
            assert keys < set(ledger._known)
            assert len(ledger) == len(keys) + 1
            loaded = ray.get([r.probe.remote(["mlflow", "ray.tune"]) for r in pool.replicas])
            assert [each["loaded"] for each in loaded] == [[]] * replicas
            rows = pool.latency({"dense": Candidate(toy.digest)}, (1, 2), 3)
            assert [row.batch_size for row in rows] == [1, 2]


def test_kill_in_mid_evaluation_changes_nothing(toy: Toy, few: Few) -> None:
    asked = [toy.candidate(count) for count in range(2, 12)]
    expected = toy.local().evaluate(asked)
    spec = toy.spec("ray_tasks:SignallingTask", folder=str(toy.folder), sleep=120.0)
    killed: list[int] = []

    def kill() -> None:
        pid = int(wait_for(toy.folder / "sleeper").read_text())
        os.kill(pid, signal.SIGKILL)  # it sleeps inside its evaluation, for longer than the test
        killed.append(pid)

    with ReplicaPool(spec, few(2)) as pool:
        # Published before a replica is lost: its replacement must know it too.
        pool.publish(toy.ranking)
        killer = threading.Thread(target=kill)
        killer.start()
        trials = pool.evaluate(asked)
        killer.join()
        assert killed and pool.num_lost == 1
        assert [t.shards for t in trials] == [t.shards for t in expected]
        pids = {each["pid"] for each in ray.get([r.probe.remote([]) for r in pool.replicas])}
        assert not pids & set(killed)
        # And the replacement itself evaluates: enough units for both.
        again = pool.evaluate([toy.candidate(count) for count in range(12, 16)])
        assert all(trial.failure is None for trial in again)


def test_a_candidate_that_kills_workers_fails_and_the_others_go_on(toy: Toy, few: Few) -> None:
    asked = [toy.candidate(count) for count in (4, 5, 6, 7, 8)]
    spec = toy.spec("ray_tasks:SignallingTask", folder=str(toy.folder), poison=5)
    with ReplicaPool(spec, few(2)) as pool:
        pool.publish(toy.ranking)
        trials = pool.evaluate(asked)
        assert pool.num_lost == 3
    assert [t.failure is None for t in trials] == [True, False, True, True, True]
    assert "lost its replica 3 times: its process died" in str(trials[1].failure)
    good = [toy.candidate(count) for count in (4, 6, 7, 8)]
    expected = toy.local().evaluate(good)
    assert [t.shards for t in trials if t.failure is None] == [t.shards for t in expected]


@pytest.mark.slow  # five starts of a replica
def test_out_of_memory_replicas_are_replaced_and_another_run_tries_again(
    toy: Toy, few: Few
) -> None:
    asked, other = toy.candidate(5), toy.candidate(6)
    task = {"folder": str(toy.folder), "short": 4}
    with (
        Ledger(toy.folder / "ledger", "a") as ledger,
        ReplicaPool(toy.spec("ray_tasks:SignallingTask", **task), few(1), ledger=ledger) as pool,
    ):
        pool.publish(toy.ranking)
        short, fine = (pool.evaluate([each])[0] for each in (asked, other))
        again = pool.evaluate([asked])[0]
        assert again.replayed and again.failure == short.failure
        assert pool.num_lost == 4
    assert fine.shards == toy.local().evaluate([other])[0].shards
    text = str(short.failure)
    assert text.startswith(
        f"EvaluationError: evaluation of candidate {digest_of(asked.key())[:10]} lost its replica "
        "3 times: RuntimeError: "
    )
    assert "you tried to allocate" in text and "give each replica more memory" in text
    assert "cluster.replicas" in text and "evaluation.batch_size" in text
    with Ledger(toy.folder / "ledger", "a") as ledger:
        later = toy.local(SignallingTask(**task), ledger)
        assert later.evaluate([other])[0].replayed
        trial = later.evaluate([asked])[0]
    assert not trial.replayed and trial.failure is None, "another run didn't try again"


def test_a_hung_replica_is_killed_at_the_deadline(toy: Toy, few: Few) -> None:
    spec = toy.spec("ray_tasks:SignallingTask", folder=str(toy.folder), sleep=600.0)
    start = time.monotonic()
    with ReplicaPool(spec, few(2, unit_timeout=2.0)) as pool:
        pool.publish(toy.ranking)
        trials = pool.evaluate([toy.candidate(count) for count in (4, 5, 6)])
        assert pool.num_lost == 1
    assert all(trial.failure is None for trial in trials)
    assert time.monotonic() - start < 60


def test_progress_of_training_arrives_while_it_runs(toy: Toy, few: Few) -> None:
    seen: list[tuple[int, int]] = []
    with ReplicaPool(
        toy.spec(), few(1), progress=lambda step, of, loss: seen.append((step, of))
    ) as pool:
        pool.publish(toy.ranking)
        trial = pool.evaluate([toy.candidate(8, training=Training(epochs=900))])[0]
    assert trial.failure is None and trial.weights is not None
    assert seen and seen == sorted(seen) and seen[-1][1] == 2700


def test_shared_weights_are_never_written(toy: Toy, few: Few) -> None:
    before = digest_of_state(toy.weights)
    dense = Candidate(toy.digest)
    with ReplicaPool(toy.spec(), few(2)) as pool:
        pool.publish(toy.ranking)
        first = pool.evaluate([dense, toy.candidate(9)])
        # Train on both replicas, in place, masked and slim and dense.
        trained = [
            Candidate(toy.digest, training=Training(epochs=2, lr=0.5, seed=seed))
            for seed in range(4)
        ]
        assert all(t.failure is None for t in pool.evaluate(trained))
        pool.ledger, pool._memory = None, {}  # ask again, don't recall
        assert answers(pool.evaluate([dense, toy.candidate(9)])) == answers(first)
        stored: PackedWeights = ray.get(pool._shared.weights[0])
        assert digest_of_state(stored.unpack()) == before
    assert digest_of_state(toy.weights) == before == toy.digest


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).to(torch.bfloat16),
        torch.tensor(7),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.randn(4, 3).t(),
        torch.randn(2).to(torch.float8_e4m3fn),
    ],
    ids=["bfloat16", "scalar", "empty", "bool", "transposed", "float8"],
)
def test_weights_of_any_dtype_travel(tensor: torch.Tensor) -> None:
    weights = Weights({"t": tensor}, {"g": (0, 2)})
    back = ray.get(ray.put(PackedWeights.pack("d", weights))).unpack()
    assert back.state["t"].dtype == tensor.dtype and back.state["t"].shape == tensor.shape
    assert digest_of_state(back) == digest_of_state(weights)


def test_what_cannot_fit_is_refused_at_once(toy: Toy) -> None:
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"64 replicas don't fit: they need 64 CPU in all"):
        ReplicaPool(toy.spec(), ClusterConfig(replicas=64))
    with pytest.raises(ClusterError, match=r"no node has 1 CPU, 1 GPU \(1 node\(s\): 8 CPU"):
        ReplicaPool(toy.spec(), ClusterConfig(replicas=1, gpus=1))
    with pytest.raises(ClusterError, match="no node has 1 CPU, 1 phone"):
        ReplicaPool(toy.spec(), ClusterConfig(replicas=1, resources={"phone": 1}))
    assert time.monotonic() - start < 5


def test_replicas_that_are_not_up_in_time_meet_their_deadline(toy: Toy) -> None:
    with pytest.raises(ClusterError, match=r"0 of 1 replicas \(6 CPU each\) were up after 0.01 s"):
        ReplicaPool(toy.spec(), ClusterConfig(replicas=1, cpus=6, start_timeout=0.01))


def groups() -> list[str]:
    """States of the placement groups that are there."""
    states = [each["state"] for each in ray.util.placement_group_table().values()]
    return [state for state in states if state != "REMOVED"]


def test_pools_that_want_all_of_a_cluster_have_it_one_after_the_other(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One by one, each replica of two pools would hold what one of the other waits for."""
    monkeypatch.setattr(cluster_module, "QUIET_SECONDS", 0.5)
    want = ClusterConfig(replicas=2, cpus=3, start_timeout=60)
    first = ReplicaPool(toy.spec(), want)
    with ThreadPoolExecutor(2) as threads:
        later = [threads.submit(ReplicaPool, toy.spec(), want) for _ in range(2)]
        with pytest.raises(TimeoutError):
            later[0].result(timeout=3)
        assert not later[1].done() and sorted(groups()) == ["CREATED", "PENDING", "PENDING"]
        assert "2 replicas wait: others hold what they need of 1 node(s): 8 CPU" in caplog.text
        first.close()
        for each in as_completed(later):
            with each.result() as pool:
                pool.publish(toy.ranking)
                assert pool.evaluate([toy.candidate(4)])[0].failure is None
    assert groups() == []


def test_a_task_that_cannot_be_made_says_so(toy: Toy, few: Few) -> None:
    with pytest.raises(TaskError, match=r"ray_tasks:BrokenTask can't be made.*no data here"):
        ReplicaPool(toy.spec("ray_tasks:BrokenTask"), few(1))
    with pytest.raises(TaskError, match="No module named 'nowhere'"):
        ReplicaPool(toy.spec("nowhere:Task"), few(1))


def test_an_exception_is_an_answer(toy: Toy, few: Few) -> None:
    with ReplicaPool(toy.spec(), few(1)) as pool:
        unknown = Candidate.of(
            {"conv3": 4}, Ranking("channels", {"conv3": torch.arange(16)}), weights=toy.digest
        )
        pool.publish(toy.ranking)
        trials = pool.evaluate([unknown, toy.candidate(4)])
    assert "was not published" in str(trials[0].failure) and trials[1].failure is None


def test_replicas_that_differ_are_refused() -> None:
    one = HostInfo("t", "d", {"train": 4}, 1, "x86", False)
    with pytest.raises(
        ClusterError, match=r"replica-1 isn't like .*numeric_class: arm against x86"
    ):
        check_alike("replica-1", HostInfo("t", "d", {"train": 4}, 1, "arm", False), one)


def test_a_caller_that_gives_up_leaves_a_usable_pool(toy: Toy, few: Few) -> None:
    def stop(step: int, of: int, loss: float) -> None:
        raise KeyboardInterrupt

    asked = [toy.candidate(8, training=Training(epochs=150, seed=s)) for s in range(3)]
    with ReplicaPool(toy.spec(), few(1), progress=stop) as pool:
        pool.publish(toy.ranking)
        with pytest.raises(KeyboardInterrupt):
            pool.evaluate(asked)
        pool.progress = None
        expected = toy.local().evaluate([toy.candidate(3)])
        assert answers(pool.evaluate([toy.candidate(3)])) == answers(expected)


def test_a_replica_is_a_plain_class(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="isn't set up"):
        Replica("r", False).publish(Ranking("channels", {}))
    task = SignallingTask(str(tmp_path))
    assert task.build_model().fc.in_features == 16
