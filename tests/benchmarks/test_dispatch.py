"""Cost of dispatch, and what a second replica brings: `pytest -m benchmark -s tests/benchmarks`."""

import tempfile
import time
from pathlib import Path

import pytest

from raycompress.config import ClusterConfig
from raycompress.distributed.cluster import connect
from raycompress.distributed.pool import ReplicaPool
from raycompress.distributed.spec import PoolSpec
from raycompress.ledger import Ledger
from raycompress.search import Candidate
from raycompress.structure import analyze
from raycompress.testing import ToyTask
from raycompress.units import Evaluation
from raycompress.weights import Weights, WeightStore

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]


def timed(replicas, num, examples, width):
    """Seconds for `num` different candidates, after each replica has warmed up."""
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
            start = time.perf_counter()
            trials = pool.evaluate([Candidate(digest, recalibrate=100 + i) for i in range(num)])
            seconds = time.perf_counter() - start
        assert all(trial.failure is None for trial in trials)
        return seconds, sum(trial.seconds for trial in trials)


def test_dispatch():
    with connect(ClusterConfig(replicas=2)):
        wall, work = timed(1, 300, 8, 8)
        print(f"\ndispatch and ledger: {1e3 * (wall - work) / 300:.2f} ms a unit beyond its work")
        one, work = timed(1, 40, 4000, 16)
        two, _ = timed(2, 40, 4000, 16)
        print(f"candidates of {1e3 * work / 40:.0f} ms: two replicas {one / two:.2f}x one")
        assert one / two > 1.2
