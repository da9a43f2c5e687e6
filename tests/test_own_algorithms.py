"""The documented example of one's own algorithms keeps the contracts, and its job runs."""

from __future__ import annotations

from typing import ClassVar

import raycompress
from jobs.own_algorithms import RandomSearch, Spread
from raycompress.loading import load_job
from raycompress.testing import CriterionContract, PrunerContract


class TestSpread(CriterionContract):
    criterion = Spread()


class TestRandomSearch(PrunerContract):
    pruner = RandomSearch(tries=3)
    budget: ClassVar = {"macs": "50%"}


def test_the_job_runs(tmp_path):
    job = load_job(
        "jobs/own_algorithms.yaml",
        [
            "cluster.executor=local",
            "model.pretrain.epochs=1",
            "recover.epochs=0.5",
            "tracking.uri=none",
            f"output={tmp_path}",
        ],
    )
    result = raycompress.run(job)
    assert [trial.pruner for trial in result.trials] == ["OneShot", "RandomSearch"]
    for trial in result.trials:
        assert trial.budget_met and trial.rows[-1].macs <= 0.5 * result.dense.macs
