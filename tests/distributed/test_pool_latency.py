"""Latency through a pool: one replica measures, the driver prices."""

import time

import pytest

from raycompress.candidate import Candidate
from raycompress.distributed.pool import ReplicaPool
from raycompress.errors import EvaluationError
from raycompress.testing import ToyTask


class HangingTask(ToyTask):
    """Its example inputs never come, once a replica is up."""

    def example_inputs(self):
        time.sleep(600.0)


def test_a_table_is_measured_once_and_comes_back(cluster, toy, few, tmp_path):
    folder = tmp_path / "latency"
    with ReplicaPool(toy.spec(), few(2)) as pool:
        table = pool.latency_table(4, folder, 2.0)
        (path,) = folder.iterdir()
        before = path.stat().st_mtime_ns
        again = pool.latency_table(4, str(folder), 2.0)
    assert path.stat().st_mtime_ns == before
    assert again.digest == table.digest and table.batch_size == 4
    assert again.latency_ms({"conv3": 3}) == table.latency_ms({"conv3": 3})
    assert table.error.num == 8


def test_a_measurement_that_hangs_ends_with_its_reason(cluster, toy, few):
    spec = toy.spec("test_pool_latency:HangingTask")
    with ReplicaPool(spec, few(1, unit_timeout=1.0)) as pool:
        with pytest.raises(
            EvaluationError,
            match=r"latency lost its replica 3 times: it measured for more than 1.5 s",
        ):
            pool.latency({"dense": Candidate(toy.digest)}, (1,), 3, 0.5)
        assert pool.num_lost > 0
