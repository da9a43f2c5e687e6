"""Splits: what fits stays in memory, what doesn't is read batch by batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import raycompress.data
from raycompress.candidate import Candidate
from raycompress.criteria import CRITERIA
from raycompress.data import Splits
from raycompress.local import LocalExecutor
from raycompress.structure import analyze
from raycompress.task import Split
from raycompress.testing import ToyTask
from raycompress.units import Evaluation
from raycompress.weights import Weights, WeightStore

CPU = torch.device("cpu")


class Watched(ToyTask):
    """Counts how many of its batches are alive at once."""

    def __init__(self, num: int = 96) -> None:
        super().__init__(num=num)
        self.most = 0
        self._alive: list[weakref.ref[Tensor]] = []

    def batches(
        self, data: Any, indices: Sequence[int], batch_size: int, device: torch.device | str
    ) -> Iterator[Any]:
        """The same batches."""
        for batch in super().batches(data, indices, batch_size, device):
            self._alive = [ref for ref in self._alive if ref() is not None]
            self._alive.append(weakref.ref(batch[0]))
            self.most = max(self.most, len(self._alive))
            yield batch


def test_what_fits_is_read_once():
    splits = Splits(ToyTask(), 32, 2, CPU)
    first, again = (list(splits.batches("validation")) for _ in range(2))
    assert len(first) == 3 and all(a is b for a, b in zip(first, again, strict=True))
    sizes = [[len(b[1]) for b in splits.batches("validation", shard)] for shard in (0, 1)]
    assert sizes == [[32, 16], [32, 16]]


def test_what_doesnt_fit_is_read_again_and_is_the_same(monkeypatch):
    kept = list(Splits(ToyTask(), 20, 3, CPU).batches("validation"))
    monkeypatch.setattr(raycompress.data, "PRELOAD_BYTES", 0)
    splits = Splits(ToyTask(), 20, 3, CPU)
    for _ in range(2):
        read = list(splits.batches("validation"))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(kept, read, strict=True))


@pytest.mark.parametrize("name", ["apoz", "mean_activation", "taylor", "obs", "wanda"])
def test_memory_of_collection_doesnt_grow_with_the_batches(tmp_path, monkeypatch, name):
    monkeypatch.setattr(raycompress.data, "PRELOAD_BYTES", 0)
    most = []
    for num in (64, 160):
        task = Watched(num)
        model = task.build_model().eval()
        structure = analyze(model, task.example_inputs(), form="module")
        store = WeightStore(tmp_path)
        executor = LocalExecutor(task, structure, store, Evaluation(batch_size=16))
        digest = store.put(Weights(model.state_dict(), {}))
        trial = executor.evaluate([Candidate(digest, collect=CRITERIA[name])])[0]
        assert trial.failure is None
        most.append(task.most)
    assert most[0] == most[1] <= 3  # of the task, of what reads, and the first


class Perceptron(nn.Module):
    """A norm over examples alone, which can't train on a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(72, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.fc2(torch.relu(self.norm(self.fc1(x.flatten(1)))))
        return logits


class OneLeft(ToyTask):
    """33 calibration examples in batches of 16."""

    def build_model(self) -> nn.Module:
        """The same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Perceptron()

    def dataset(self, split: Split) -> TensorDataset:
        """One example more than two batches."""
        data = super().dataset(split)
        return TensorDataset(*(t[:33] for t in data.tensors))


def test_recalibration_leaves_out_a_smaller_last_batch(tmp_path):
    task = OneLeft()
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs(), form="module")
    store = WeightStore(tmp_path)
    executor = LocalExecutor(task, structure, store, Evaluation(batch_size=16))
    digest = store.put(Weights(model.state_dict(), {}))
    built = executor.host.build(Candidate(digest, recalibrate=9))
    data = task.dataset("calibration").tensors[0]
    hidden = [model.fc1(part.flatten(1)) for part in (data[:16], data[16:32])]
    mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    torch.testing.assert_close(built.norm.running_mean, mean)
    assert executor.evaluate([Candidate(digest, recalibrate=9)])[0].failure is None
