"""One Ray for the tests of each file here, and what they need to ask a pool."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raycompress.candidate import Candidate, Ranking
from raycompress.config import ClusterConfig
from raycompress.distributed.spec import PoolSpec
from raycompress.ledger import Ledger
from raycompress.local import LocalExecutor
from raycompress.structure import Structure, analyze
from raycompress.testing import ToyTask
from raycompress.weights import Weights, WeightStore

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
FOLDER = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """8 logical CPUs on whatever cores there are.

    It goes with its file: heads that other tests start need the ports that it holds.
    """
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200_000_000,
    )
    yield
    ray.shutdown()


@dataclass
class Toy:
    """The toy model's pieces below one folder."""

    folder: Path
    structure: Structure
    weights: Weights
    digest: str
    ranking: Ranking

    def spec(self, task: str = "raycompress.testing:ToyTask", **task_args: Any) -> PoolSpec:
        """What replicas host."""
        return PoolSpec(
            task=task,
            task_args=task_args,
            structure=self.structure,
            store=str(self.folder / "weights"),
            weights={self.digest: self.weights},
            import_paths=(FOLDER,),
        )

    def candidate(self, count: int, **options: Any) -> Candidate:
        """Keeps `count` of the 16 channels of conv3."""
        return Candidate.of({"conv3": count}, self.ranking, weights=self.digest, **options)

    def local(self, task: ToyTask | None = None, ledger: Ledger | None = None) -> LocalExecutor:
        """What a pool's answers are compared with."""
        executor = LocalExecutor(
            task if task is not None else ToyTask(),
            self.structure,
            WeightStore(self.folder / "local-weights"),
            ledger=ledger,
        )
        executor.share(self.digest, self.weights)
        executor.publish(self.ranking)
        return executor


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A fresh folder with the dense weights in its store."""
    task = ToyTask()
    model = task.build_model().eval()
    weights = Weights(dict(model.state_dict()), {})
    digest = WeightStore(tmp_path / "weights").put(weights)
    generator = torch.Generator().manual_seed(0)
    orders = {
        "conv1": torch.randperm(8, generator=generator),
        "conv3": torch.randperm(16, generator=generator),
    }
    structure = analyze(model, task.example_inputs())
    return Toy(tmp_path, structure, weights, digest, Ranking("channels", orders))


@pytest.fixture
def few() -> Callable[..., ClusterConfig]:
    """Settings of a small pool; fractions of a CPU, so that any number fits."""

    def make(replicas: int, **options: Any) -> ClusterConfig:
        return ClusterConfig(replicas=replicas, cpus=0.5, **options)

    return make


def wait_for(path: Path, seconds: float = 60.0) -> Path:
    """Waits until a file is there and not empty."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < end, f"{path} never appeared"
        time.sleep(0.02)
    return path
