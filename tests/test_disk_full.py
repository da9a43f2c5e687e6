"""A full disk, a real one: what was finished is kept, and with room the same job continues."""

from __future__ import annotations

import subprocess

import pytest
import torch

from raycompress.driver import run
from raycompress.errors import StorageError
from raycompress.ledger import Ledger, read_ledger
from raycompress.storage import write_whole
from raycompress.weights import Weights, WeightStore
from tests.disks import KB, Filling, fill


def test_a_ledger_keeps_whole_records_alone(disk):
    with Ledger(disk / "ledger", "job") as ledger:
        ledger.put({"a": {"value": 1}})
        ballast = fill(disk)
        big = {f"k{i}": {"value": "x" * 1000} for i in range(20)}
        with pytest.raises(StorageError) as caught:
            ledger.put(big)
        assert ledger.get("k0") is None, "what isn't on disk isn't known"
        assert len((disk / "ledger/job.jsonl").read_bytes()) < 100, "no part of them is on disk"
        ballast.unlink()
        ledger.put({"b": {"value": 2}})
    message = str(caught.value)
    assert message.startswith("no space left to write ") and message.count("\n") == 0
    assert f"bytes to {disk}/ledger/job.jsonl, 0 bytes are free" in message
    assert [r["key"] for r in read_ledger(disk / "ledger")] == ["a", "b"]


def test_weights_and_files_appear_whole_or_not_at_all(disk):
    store = WeightStore(disk / "weights")
    small = store.put(Weights({"w": torch.zeros(100)}, {}))
    ballast = fill(disk, leave=40 * KB)
    big = Weights({"w": torch.arange(50_000.0)}, {})
    with pytest.raises(StorageError, match=rf"write 200,000 bytes to {disk}/weights/.*are free"):
        store.put(big)
    write_whole(disk / "results.json", b"old")
    with pytest.raises(StorageError, match=rf"write 200,000 bytes to {disk}/results\.json"):
        write_whole(disk / "results.json", bytes(200_000))
    assert (disk / "results.json").read_bytes() == b"old"
    names = sorted(path.name for path in disk.rglob("*") if path.is_file())
    assert names == sorted([f"{small}.safetensors", "ballast", "results.json"]), "no leftovers"
    ballast.unlink()
    assert torch.equal(store.get(store.put(big)).state["w"], big.state["w"])


JOB = {
    "name": "full",
    "task": "raycompress.testing:ToyTask",
    "pruners": [
        {"type": "SimulatedAnnealing", "iterations": 30, "neighbours": 3, "recalibrate": 0},
        {"type": "L1Filter"},
    ],
    "budgets": [{"params": "60%"}],
    "latency": {"batch_sizes": [1], "repeats": 1},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


def test_a_job_ends_at_once_with_the_reason_and_continues_with_room(disk, tmp_path):
    whole = run({**JOB, "output": str(tmp_path / "whole")})
    progress = Filling(disk, 0)
    job = {**JOB, "output": str(disk / "out")}
    with pytest.raises(StorageError, match=rf"no space left to write .*{disk}/out.*are free"):
        run(job, progress=progress)
    assert not any("L1Filter failed" in each for each in progress.messages), "nothing goes on"
    kept = [record["key"] for record in read_ledger(disk / "out/ledger")]
    assert kept and len(set(kept)) == len(kept)
    (disk / "ballast").unlink()
    # The results, with their figures, want a larger disk than the search.
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    result = run(job)
    for trial, expected in zip(result.trials, whole.trials, strict=True):
        assert trial.counts == expected.counts and trial.weights == expected.weights
        assert [p.best_loss for p in trial.curve] == [p.best_loss for p in expected.curve]
    keys = [record["key"] for record in read_ledger(disk / "out/ledger")]
    assert set(kept) <= set(keys)
    assert len(set(keys)) == len(keys), "something was done twice"
    assert result.trials[0].replayed > 0
