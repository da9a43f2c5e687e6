"""The splits of a task on one device: shards, and batches that stay in memory while they fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from raycompress.task import Split, Task

__all__ = ["Splits", "shard_bounds"]

PRELOAD_BYTES = 2 << 30
"""A split's batches stay in memory up to this size; larger ones are read each time."""


class Splits:
    """Datasets and batches of a task.

    Args:
        task: Has the data.
        batch_size: Examples in a batch.
        num_shards: Parts of a split; every batch lies inside of one.
        device: Where batches are.
    """

    def __init__(self, task: Task, batch_size: int, num_shards: int, device: torch.device) -> None:
        self._task = task
        self._batch_size = batch_size
        self._num_shards = num_shards
        self._device = device
        self._data: dict[str, Any] = {}
        self._batches: dict[tuple[str, int], list[Any]] = {}

    def dataset(self, split: Split) -> Any:
        """The dataset of a split, made once."""
        if split not in self._data:
            self._data[split] = self._task.dataset(split)
        return self._data[split]

    def batches(self, split: Split, shard: int | None = None) -> Iterable[Any]:
        """Batches of one shard, or of a whole split, to be gone through once.

        They are kept in memory if the split fits, by the size of its first batch; else they are
        read one after the other, and none is kept.
        """
        key = (split, -1 if shard is None else shard)
        if key in self._batches:
            return self._batches[key]
        data = self.dataset(split)
        start, stop = shard_bounds(len(data), self._num_shards, shard)
        indices = range(start, stop)
        batches = iter(self._task.batches(data, indices, self._batch_size, self._device))
        first = next(batches, None)
        if first is None:
            return []
        if _num_bytes(first) * len(data) / min(self._batch_size, stop - start) < PRELOAD_BYTES:
            self._batches[key] = [first, *batches]
            return self._batches[key]
        return itertools.chain(iter([first]), batches)

    def calibration(self, number: int) -> list[Any]:
        """The first so many calibration batches, without a last one that is smaller than others."""
        whole = len(self.dataset("calibration")) // self._batch_size
        return list(itertools.islice(self.batches("calibration"), min(number, max(whole, 1))))


def shard_bounds(num: int, num_shards: int, shard: int | None) -> tuple[int, int]:
    """First and last + 1 example of a shard; the whole split for None."""
    if shard is None:
        return 0, num
    return num * shard // num_shards, num * (shard + 1) // num_shards


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_num_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_num_bytes(item) for item in value)
    return 0
