"""The executor without Ray: every unit runs in this process, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from raycompress.candidate import Candidate, Ranking
from raycompress.executor import LedgerExecutor
from raycompress.host import ModelHost
from raycompress.ledger import Ledger
from raycompress.storage import Place
from raycompress.structure import Structure
from raycompress.structure.latency.measure import LatencyRow
from raycompress.structure.latency.table import LatencyTable
from raycompress.task import Progress, Task
from raycompress.units import Evaluation, HostInfo, Unit, UnitResult
from raycompress.weights import Weights, WeightStore

__all__ = ["LocalExecutor"]


class LocalExecutor(LedgerExecutor):
    """Runs every unit in this process, in order.

    Args:
        task: The user's task.
        structure: Of its model.
        store: Where trained weights go.
        evaluation: Settings.
        device: Where the model runs.
        ledger: Where finished work is recorded; None keeps it in memory.
        progress: Called with (step, number of steps, loss) while a training unit runs.
    """

    def __init__(
        self,
        task: Task,
        structure: Structure,
        store: WeightStore,
        evaluation: Evaluation | None = None,
        *,
        device: str = "cpu",
        ledger: Ledger | None = None,
        progress: Progress | None = None,
    ) -> None:
        settings = evaluation if evaluation is not None else Evaluation()
        super().__init__(structure, store, settings, ledger, progress)
        self.host = ModelHost(task, structure, store, settings, device)
        self._info = self.host.info()

    @property
    def num_workers(self) -> int:
        """One."""
        return 1

    @property
    def info(self) -> HostInfo:
        """What the host is."""
        return self._info

    def _run(self, units: Sequence[Unit]) -> Iterator[tuple[int, UnitResult]]:
        for index, unit in enumerate(units):
            yield index, self.host.run(unit, self.progress)

    def _publish(self, ranking: Ranking) -> None:
        self.host.publish(ranking)

    def _share(self, digest: str, weights: Weights) -> None:
        self.host.share(digest, weights)

    def latency(
        self,
        candidates: Mapping[str, Candidate],
        batch_sizes: Sequence[int],
        repeats: int,
        max_seconds: float | None = None,
        runtime: str = "",
    ) -> list[LatencyRow]:
        """Measures candidates against each other, interleaved."""
        return self.host.latency(candidates, batch_sizes, repeats, max_seconds, runtime)

    def latency_table(
        self, batch_size: int = 1, folder: str | Place | None = None, max_seconds: float = 300.0
    ) -> LatencyTable:
        """The model's latency table, measured here."""
        return self.host.latency_table(batch_size, folder, max_seconds)
