"""Cost of dispatch, and what a second replica brings: `pytest -m benchmark -s tests/benchmarks`.

Two replicas need two free cores: look at `uptime` first. Ray's workers yield to everything else
(RAY_worker_niceness is 15 unless it is set).
"""

import tempfile
import time
from pathlib import Path

import pytest

from raycompress.candidate import Candidate
from raycompress.config import ClusterConfig
from raycompress.distributed.cluster import connect
from raycompress.distributed.pool import ReplicaPool
from raycompress.distributed.spec import PoolSpec
from raycompress.ledger import Ledger
from raycompress.structure import analyze
from raycompress.testing import ToyTask
from raycompress.units import Evaluation
from raycompress.weights import Weights, WeightStore

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]


def timed(replicas, num, examples, width):
    """Seconds for `num` different candidates after a warm-up; of work; of the driver's CPU."""
    args = {"width": width, "num": examples}
    task = ToyTask(**args)
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs())
    with tempfile.TemporaryDirectory() as folder:
        weights = Weights(model.state_dict(), {})
        store = WeightStore(folder)
        spec = PoolSpec(
            task="raycompress.testing:ToyTask",
            task_args=args,
            structure=structure,
            store=folder,
            evaluation=Evaluation(num_shards=1),
            weights={store.put(weights): weights},
        )
        digest = next(iter(spec.weights))
        ledger = Ledger(Path(folder) / "ledger", "a")
        with ReplicaPool(spec, ClusterConfig(replicas=replicas), ledger=ledger) as pool:
            pool.evaluate([Candidate(digest, recalibrate=i + 1) for i in range(2 * replicas)])
            start, cpu = time.perf_counter(), time.process_time()
            trials = pool.evaluate([Candidate(digest, recalibrate=100 + i) for i in range(num)])
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        assert all(trial.failure is None for trial in trials)
        return seconds, sum(trial.seconds for trial in trials), cpu


def test_the_driver_costs_less_than_two_milliseconds_a_unit():
    """Keys, dispatch, answers and a durable ledger, in steady state.

    Two bounds: what one replica's units take beyond the work itself (what dispatch doesn't hide
    behind work), and the CPU time of the driver's process (what it would take of two replicas).
    """

    def measure():
        wall, work, cpu = timed(1, 300, 8, 8)
        return 1e3 * (wall - work) / 300, 1e3 * cpu / 300

    with connect(ClusterConfig(replicas=1)):
        idle, cpu = zip(*(measure() for _ in range(3)), strict=True)
    print(f"\na unit: {min(idle):.2f} ms beyond its work, {min(cpu):.2f} ms of the driver's CPU")
    assert min(idle) < 2 and min(cpu) < 2


def test_two_replicas_do_the_work_of_1_7():
    """Candidates of 100 ms or more, on two cores."""
    with connect(ClusterConfig(replicas=2)):
        one, work, _ = min(timed(1, 24, 10_000, 16) for _ in range(2))
        two, *_ = min(timed(2, 24, 10_000, 16) for _ in range(2))
    print(f"\ncandidates of {1e3 * work / 24:.0f} ms: two replicas {one / two:.2f}x one")
    assert work / 24 >= 0.1
    assert one / two >= 1.7
