"""A full disk, a real one: what was finished is kept, and with room the same job continues."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from raycompress.driver import run
from raycompress.errors import StorageError
from raycompress.ledger import Ledger, read_ledger
from raycompress.storage import write_whole
from raycompress.weights import Weights, WeightStore

KB = 1024


@pytest.fixture
def disk(tmp_path):
    """512 KiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no permission to mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fills a disk but for some bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4 * KB)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    return ballast


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


class Filling:
    """A job's progress, by which its disk is filled in the middle of a search."""

    def __init__(self, disk: Path, leave: int) -> None:
        self.disk, self.leave, self.steps = disk, leave, 0
        self.messages: list[str] = []

    def stage(self, name: str) -> None:
        self.messages.append(name)

    def step(self, text: str, done: int = 0, total: int | None = None) -> None:
        self.steps += 1
        if self.steps == 1:
            fill(self.disk, self.leave)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        pass


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
