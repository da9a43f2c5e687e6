"""What travels between executors and model hosts: small, plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from raycompress.candidate import Candidate, Shard
from raycompress.task import Split

__all__ = ["Evaluation", "HostInfo", "Unit", "UnitResult", "lacks_memory"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How candidates are evaluated; part of every ledger key.

    Attributes:
        batch_size: Examples in a forward pass.
        num_shards: Parts of the validation split; the smallest piece of work.
        threads: CPU threads of each host. Measured: on few busy cores 1 is fastest.
    """

    batch_size: int = 256
    num_shards: int = 4
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_shards", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {getattr(self, name)}")

    @contextmanager
    def own_threads(self) -> Iterator[None]:
        """This process computes with so many threads, and with as many as before afterwards."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that a host is sent.

    Attributes:
        candidate: With `collect`: collect it; with `training`: train it; and nothing else.
            With neither: evaluate it.
        split: Which data.
        shards: Indices of the shards to evaluate; empty for the other two.
    """

    candidate: Candidate
    split: Split = "validation"
    shards: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnitResult:
    """What a host answers; small.

    Attributes:
        shards: Sums for each shard that was asked for, in order.
        weights: Digest of the trained weights, or of what was collected.
        failure: Exception and message, if the candidate failed.
        again: It failed for what may be otherwise in another attempt, such as a lack of memory.
        seconds: Time spent.
        worker: Name of the host.
    """

    shards: tuple[Shard, ...] = ()
    weights: str | None = None
    failure: str | None = None
    seconds: float = 0.0
    worker: str = "local"
    again: bool = False


@dataclass(frozen=True)
class HostInfo:
    """What an executor must know of its hosts; equal on all of one pool, or they don't mix.

    Attributes:
        task: Digest of the task.
        data: Digest of sizes and sample examples of the splits.
        num_examples: Examples for each split.
        steps_per_epoch: Batches of the train split.
        numeric_class: Device model, torch version and threads: what results depend on.
        whole: The task's metric is no mean over examples; it is evaluated in one piece.
    """

    task: str
    data: str
    num_examples: Mapping[str, int]
    steps_per_epoch: int
    numeric_class: str
    whole: bool


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an exception says that there wasn't enough; many libraries say so only in words."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    )
