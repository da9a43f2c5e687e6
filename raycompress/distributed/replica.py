"""The replica: a model host in a Ray actor's process.

A plain class; `ReplicaPool` wraps it with `ray.remote`. It imports neither Ray nor MLflow.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from raycompress.candidate import Candidate, Ranking
from raycompress.errors import ClusterError, TaskError
from raycompress.host import ModelHost
from raycompress.storage import Place
from raycompress.structure.latency.measure import LatencyRow
from raycompress.structure.latency.table import LatencyTable
from raycompress.units import HostInfo, Unit, UnitResult
from raycompress.weights import WeightStore

if TYPE_CHECKING:
    from raycompress.distributed.spec import PackedWeights, SharedSpec
    from raycompress.structure import Structure

__all__ = ["Replica"]

_log = logging.getLogger(__name__)


class Replica:
    """Hosts the model; all that it is told comes by `setup` and `publish`.

    Args:
        name: In results and logs.
        gpu: The model runs on the first GPU that Ray lends, else on the CPU.
    """

    def __init__(self, name: str, gpu: bool) -> None:
        self.name = name
        self.gpu = gpu
        self.host: ModelHost | None = None

    def setup(
        self,
        spec: SharedSpec,
        structure: Structure,
        *published: Ranking | PackedWeights,
    ) -> HostInfo:
        """Builds the host; what was published to the pool before is given to it at once.

        Raises:
            TaskError: The task can't be imported or constructed here.
            ClusterError: There is no GPU, though one was asked for.
        """
        from raycompress.distributed.spec import import_object

        for path in reversed(spec.import_paths):
            if path not in sys.path:
                sys.path.insert(0, path)
        torch.set_num_threads(spec.evaluation.threads)
        if self.gpu and not torch.cuda.is_available():
            raise ClusterError(
                f"replica {self.name} was lent a GPU, but torch {torch.__version__} sees none "
                f"on {os.uname().nodename}: install a CUDA build there, or set cluster.gpus to 0"
            )
        try:
            task = import_object(spec.task)(**spec.task_args)
        except Exception as error:
            raise TaskError(
                f"task {spec.task} can't be made in a replica on {os.uname().nodename}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.host = ModelHost(
            task,
            structure,
            WeightStore(spec.store),
            spec.evaluation,
            "cuda:0" if self.gpu else "cpu",
            self.name,
        )
        for value in published:
            self.publish(value)
        return self.host.info()

    def publish(self, value: Ranking | PackedWeights) -> None:
        """Makes a ranking or weights known."""
        host = self._hosted()
        if isinstance(value, Ranking):
            host.publish(value)
        else:
            host.share(value.digest, value.unpack())

    def run(self, unit: Unit) -> UnitResult:
        """Trains or evaluates."""
        result = self._hosted().run(unit)
        if result.failure is not None and "CUDA error" in result.failure and not result.again:
            # The CUDA context is broken for good: every later unit would fail here.
            _log.error("replica %s ends: %s", self.name, result.failure)
            os._exit(1)
        return result

    def progress(self) -> tuple[int, int, float] | None:
        """(step, number of steps, loss) of the training that runs; None if none does."""
        return None if self.host is None else self.host.progress

    def latency(
        self,
        candidates: Mapping[str, Candidate],
        batch_sizes: Sequence[int],
        repeats: int,
        max_seconds: float | None,
        runtime: str,
    ) -> list[LatencyRow]:
        """Measures candidates against each other on this replica's device, or on a runtime."""
        return self._hosted().latency(candidates, batch_sizes, repeats, max_seconds, runtime)

    def latency_table(
        self, batch_size: int, folder: str | Place | None, max_seconds: float
    ) -> LatencyTable:
        """Measures the model's latency table on this replica's device."""
        return self._hosted().latency_table(batch_size, folder, max_seconds)

    def probe(self, modules: Sequence[str]) -> dict[str, Any]:
        """Process id, and which of the modules are loaded; for tests and diagnosis."""
        return {"pid": os.getpid(), "loaded": [name for name in modules if name in sys.modules]}

    def _hosted(self) -> ModelHost:
        if self.host is None:
            raise ClusterError(f"replica {self.name} isn't set up")
        return self.host
