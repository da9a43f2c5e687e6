"""Killed replicas, trials, nodes and drivers: jobs end as if nothing had happened."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from raycompress.budget import Budget
from raycompress.config import ClusterConfig
from raycompress.distributed.pool import DEPTH, ReplicaPool
from raycompress.distributed.spec import PoolSpec
from raycompress.driver import run
from raycompress.executor import LedgerExecutor
from raycompress.ledger import Ledger
from raycompress.local import LocalExecutor
from raycompress.pruning import AutoCompress, CurveSolver, NetAdapt, Pruner, SimulatedAnnealing
from raycompress.pruning.pruner import Problem
from raycompress.results import JobResult
from raycompress.search import run_search
from raycompress.structure import analyze
from raycompress.weights import Weights, WeightStore
from tests.distributed.chaos import (
    Killer,
    Nodes,
    Victims,
    alive,
    check_books,
    events,
    recorded,
    records,
    the_trial,
)
from tests.distributed.chaos_jobs import JOBS, REPLICAS, TASK, job, states, store, told
from tests.distributed.chaos_task import ChaosTask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
KILLS = 3


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes(2, cpus=4)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.cluster.shutdown()


@pytest.fixture
def whole(nodes: Nodes) -> Nodes:
    """With new nodes where a test has killed some."""
    nodes.restore()
    return nodes


SEARCHES: dict[str, Pruner] = {
    "annealing": SimulatedAnnealing(iterations=6, neighbours=3, chains=2, recalibrate=2),
    "net-adapt": NetAdapt(iterations=4, epochs=0.7),
    "curves": CurveSolver(iterations=3),
    "auto-compress": AutoCompress(rounds=2),
}


def searched(pruner: Pruner, seed: int, executor: LedgerExecutor, folder: Path) -> Any:
    """The winner, all that was answered on the way, and what it cost."""
    store = WeightStore(folder / "weights")
    model = ChaosTask("").build_model().eval()
    problem = Problem(
        model=model,
        structure=executor.structure,
        weights=store.put(Weights(model.state_dict(), {})),
        executor=executor,
        store=store,
        budget=Budget.of({"params": "40%"}),
        seed=seed,
    )
    answers: list[Any] = []
    winner = run_search(
        pruner.search(problem),
        executor,
        lambda step, trials: answers.extend(
            (step, t.candidate, t.shards, t.weights, t.failure, t.dropped) for t in trials
        ),
    )
    return winner, answers, pytest.approx(executor.dfe)  # summed in the order of arrival


def num_begun(log: Path) -> int:
    return sum(event.what == "begun" for event in events(log))


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SEARCHES)
def test_killed_replicas_change_nothing(name: str, seed: int, tmp_path: Path) -> None:
    pruner, rng = SEARCHES[name], random.Random(f"{name} {seed}")
    task = ChaosTask(str(tmp_path / "calm.log"))
    structure = analyze(task.build_model().eval(), task.example_inputs())
    calm, out, log = tmp_path / "calm", tmp_path / "out", tmp_path / "log"
    with Ledger(calm / "ledger", "t") as ledger:
        local = LocalExecutor(task, structure, WeightStore(calm / "weights"), ledger=ledger)
        expected = searched(pruner, seed, local, calm)
    assert check_books(task.log, calm, []) == 0

    moments = sorted(rng.sample(range(num_begun(task.log) * 2 // 3), KILLS))
    killer = Killer(log, out, moments, rng)
    spec = PoolSpec(
        task=TASK,
        task_args={"log": str(log), "seconds": 0.03},
        structure=structure,
        store=str(out / "weights"),
        import_paths=(str(ROOT),),
    )
    cluster = ClusterConfig(replicas=REPLICAS, cpus=0.5)
    with Ledger(out / "ledger", "t") as ledger, ReplicaPool(spec, cluster, ledger=ledger) as pool:
        killer.start()
        found = searched(pruner, seed, pool, out)
        strikes = killer.done()
        assert pool.num_lost == KILLS
    assert found == expected
    assert records(out) == records(calm)
    assert 1 <= check_books(log, out, strikes) <= DEPTH * KILLS


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Jobs in one process that nothing disturbs, each run once: output and result."""
    done: dict[str, tuple[Path, JobResult]] = {}

    def undisturbed(name: str) -> tuple[Path, JobResult]:
        if name not in done:
            output = tmp_path_factory.mktemp("calm") / "out"
            done[name] = output, run(job(name, output, executor="local"))
        return done[name]

    return undisturbed


def moments_of(calm: Path, rng: random.Random, num: int = 1) -> list[int]:
    """Drawn from the first two thirds of a job's units."""
    return sorted(rng.sample(range(num_begun(Path(f"{calm}.log")) * 2 // 3), num))


@pytest.mark.parametrize(
    ("name", "who", "kills"),
    [
        ("two trials", "replica", 3),
        ("study", "replica", 3),
        ("curves", "trial", 1),
        ("annealing", "trial", 2),
        ("annealing", "node", 1),
        ("net-adapt", "node", 1),
        ("two trials", "node", 1),
    ],
)
def test_what_is_killed_in_a_job_changes_nothing(
    name: str, who: str, kills: int, whole: Nodes, calm: Any, tmp_path: Path
) -> None:
    before, expected = calm(name)
    rng, output = random.Random(f"{name} {who}"), tmp_path / "out"
    victims: dict[str, Victims] = {"trial": the_trial, "node": whole.one}
    killer = Killer(
        *(Path(f"{output}.log"), output, moments_of(before, rng, kills), rng),
        *([victims[who]] if who in victims else []),
        alone=who == "replica",
    )
    killer.start()
    result = run(job(name, output, 0.03))
    strikes = killer.done()
    assert told(result) == told(expected)
    assert records(output) == records(before)
    trials = 2 if name in ("two trials", "study") else 1
    assert check_books(killer.log, output, strikes) <= kills * DEPTH * REPLICAS * trials


def raycompress(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "raycompress", "run", str(path), "--json"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_driver_goes_on_where_it_was(
    name: str, whole: Nodes, calm: Any, tmp_path: Path, migrated: Path
) -> None:
    before, expected = calm(name)
    rng, output = random.Random(f"{name} driver"), tmp_path / "out"
    content = job(name, output, 0.03, address=whole.address)
    if name == "two trials":
        content["tracking"] = {}
        store(output, migrated)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    driver = raycompress(tmp_path / "job.yaml")
    killer = Killer(
        *(Path(f"{output}.log"), output, [], rng),
        lambda busy, rng: [driver.pid] if busy else [],
        alone=False,
    )
    strike = killer.strike(*moments_of(before, rng))
    driver.communicate()
    pids, end = {event.pid for event in events(killer.log)}, time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "replicas outlive their driver"
        time.sleep(0.1)
    # Trials lived a moment longer: what they began and what they finished meanwhile counts too.
    strike = replace(strike, time=time.monotonic(), finished=recorded(output))
    if name == "two trials":
        assert set(states(output)) == {"RUNNING"}

    driver = raycompress(tmp_path / "job.yaml")
    out, err = driver.communicate()
    assert driver.returncode == 0, err
    assert told(JobResult.from_json(out)) == told(expected)
    assert records(output) == records(before)
    trials = 2 if name in ("two trials", "study") else 1
    assert check_books(killer.log, output, [strike]) <= DEPTH * REPLICAS * trials
    if name == "two trials":
        assert states(output) == ["FINISHED"] * 3  # the job's, and one for each trial
