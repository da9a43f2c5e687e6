"""Nodes that go and don't come back at once, and processes that die again and again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from conftest import Toy
from ray_tasks import finished

from raycompress.candidate import Training
from raycompress.config import ClusterConfig
from raycompress.distributed.pool import MAX_LOSSES, ReplicaPool
from raycompress.distributed.tune import MAX_RETRIES, TrialSpec, run_trials
from raycompress.driver import run
from raycompress.errors import ClusterError
from tests.distributed.chaos import Killer, Nodes, check_books, records
from tests.distributed.chaos_jobs import TASK, job, states, store, told

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
ONE = {"replicas": 1, "cpus": 1.0}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes(MAX_LOSSES + 1, cpus=1)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.cluster.shutdown()


def test_a_unit_outlives_any_number_of_nodes(nodes: Nodes, toy: Toy) -> None:
    """They are no sign that it kills its workers."""
    log = toy.folder / "log"
    spec = replace(toy.spec(TASK, log=str(log), seconds=0.05), import_paths=(str(ROOT),))
    asked = toy.candidate(8, training=Training(epochs=10))
    (expected,) = toy.local().evaluate([asked])
    with ReplicaPool(spec, ClusterConfig(**ONE)) as pool:
        pool.publish(toy.ranking)
        # Each strikes after one more unit has begun: the same one.
        killer = Killer(log, toy.folder, list(range(MAX_LOSSES)), random.Random(0), nodes.one)
        killer.start()
        (trial,) = pool.evaluate([asked])
        strikes = killer.done()
        assert pool.num_lost == MAX_LOSSES
    assert {event.unit for each in strikes for event in each.killed} == {strikes[0].killed[0].unit}
    assert trial.failure is None
    assert (trial.weights, trial.shards) == (expected.weights, expected.shards)


def test_trials_that_wait_for_lost_nodes_say_so_and_go_on_when_they_are_back(
    nodes: Nodes, tmp_path: Path, migrated: Path
) -> None:
    calm, output = tmp_path / "calm", tmp_path / "out"
    expected = run(job("annealing", calm, executor="local"))
    nodes.restore(1)
    store(output, migrated)
    content = job("annealing", output, 0.05, **ONE, start_timeout=30.0)
    content["tracking"] = {}
    killer = Killer(Path(f"{output}.log"), output, [5], random.Random(0), nodes.one, alone=False)
    killer.start()
    with pytest.raises(
        ClusterError, match=r"a trial with 1 replicas doesn't fit: no node has 1 CPU \(1 node"
    ):
        run(content)
    strikes = killer.done()
    assert states(output) == ["FAILED"] * 2  # the job's, and the trial's
    nodes.restore(1)
    assert told(run(content)) == told(expected)
    assert records(output) == records(calm)
    assert check_books(killer.log, output, strikes) <= 2
    assert states(output) == ["FINISHED"] * 2


def test_a_trial_is_restarted_while_it_comes_further(nodes: Nodes, toy: Toy) -> None:
    nodes.restore(2)
    ledger = toy.folder / "ledger"
    ledger.mkdir()

    def spec(name: str, falls: str) -> TrialSpec:
        payload = {"ledger": str(ledger), "part": name, "counts": [3, 5, 7, 9], "falls": falls}
        return TrialSpec(name, payload)

    results, failures = run_trials(
        [spec("falls-once-at-each-step", "once"), spec("falls-at-one-step", "always")],
        "ray_tasks:run_search_trial",
        toy.spec(),
        ClusterConfig(**ONE),
        toy.folder / "job",
        finished,
        shared={"ranking": toy.ranking, "weights": toy.digest},
    )
    assert MAX_RETRIES < 3  # how often the one falls that comes through
    expected = [t.score for t in toy.local().evaluate([toy.candidate(c) for c in (3, 5, 7, 9)])]
    assert results == {"falls-once-at-each-step": {"scores": expected, "num_evaluated": 1}}
    reason = f"its process was lost {MAX_RETRIES + 1} times without a new step: "
    assert failures["falls-at-one-step"].startswith(reason)
