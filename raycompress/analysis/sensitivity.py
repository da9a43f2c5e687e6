"""Sensitivity analysis: the score of the model with one group pruned, at each sparsity.

As NNI's SensitivityAnalysis, over channel groups, which is what can really be removed; with the
criterion "level", over the single weights of layers.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from raycompress.candidate import Candidate, Ranking, Trial
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.masks import num_kept
from raycompress.pruning.pruner import Problem
from raycompress.search import Executor

__all__ = ["Sensitivity", "SensitivityRow", "write_sensitivity"]

KEY = "sensitivity.criterion"


@dataclass(frozen=True)
class SensitivityRow:
    """One point of one curve.

    Attributes:
        group: Channel group, or layer for the criterion "level".
        sparsity: Fraction asked to be removed.
        kept: Units really kept.
        num: Units there are.
        score: Mean validation score.
        loss: Mean validation loss.
    """

    group: str
    sparsity: float
    kept: int
    num: int
    score: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The analysis; its fields are the keys of a job's `sensitivity` (see `SensitivityConfig`)."""

    criterion: str = "l1"
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    early_stop: Literal["minimize", "maximize", "dropped", "raised"] | None = None
    early_stop_value: float | None = None
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        criterion(self.criterion, KEY)

    def units(self, problem: Problem) -> dict[str, str]:
        """Names of the curves, each with its key in the ranking.

        Raises:
            ConfigError: `layers` names one that has nothing to prune.
        """
        fine = criterion(self.criterion, KEY).kind == "weights"
        if fine:
            names = {name: f"{name}.weight" if name else "weight" for name in problem.layers()}
            owners: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
        else:
            names = {name: name for name in problem.groups()}
            owners = {name: problem.structure.group(name).producers for name in names}
        for layer in self.layers:
            if not any(layer in owned for owned in owners.values()):
                raise ConfigError(
                    f"sensitivity.layers: {layer!r} has no channels that can be pruned; "
                    f"those that have: {', '.join(names)}"
                )
        if self.layers:
            names = {n: key for n, key in names.items() if set(owners[n]) & set(self.layers)}
        return names

    def search(
        self, problem: Problem, dense_score: float
    ) -> Generator[Sequence[Candidate], list[Trial], list[SensitivityRow]]:
        """Yields candidates; returns the curves, ordered by group and sparsity.

        Without early stop all points are asked for at once; with it, one sparsity at a time of
        every curve that goes on, so that what is evaluated never depends on the workers.

        Args:
            problem: The dense model; its budget is not used.
            dense_score: Validation score of the dense model, for "dropped" and "raised".
        """
        names = self.units(problem)
        ranking = yield from problem.rank(criterion(self.criterion, KEY), list(names))
        points = [(name, sparsity) for sparsity in self.sparsities for name in names]
        waves = (
            [points]
            if self.early_stop is None
            else [[p for p in points if p[1] == s] for s in self.sparsities]
        )
        stopped: set[str] = set()
        rows = []
        for wave in waves:
            asked = [(name, s) for name, s in wave if name not in stopped]
            if not asked:
                break
            counts = [
                num_kept(len(ranking.orders[names[name]]), sparsity) for name, sparsity in asked
            ]
            trials = yield [
                self._candidate(problem, ranking, names[name], count)
                for (name, _), count in zip(asked, counts, strict=True)
            ]
            for (name, sparsity), count, trial in zip(asked, counts, trials, strict=True):
                num = len(ranking.orders[names[name]])
                rows.append(SensitivityRow(name, sparsity, count, num, trial.score, trial.loss))
                if self._stops(trial.score, dense_score):
                    stopped.add(name)
        order = {name: index for index, name in enumerate(names)}
        return sorted(rows, key=lambda row: (order[row.group], row.sparsity))

    def run(self, problem: Problem, executor: Executor, dense_score: float) -> list[SensitivityRow]:
        """Drives `search` to its end."""
        search = self.search(problem, dense_score)
        try:
            candidates = next(search)
            while True:
                candidates = search.send(executor.evaluate(candidates))
        except StopIteration as stop:
            rows: list[SensitivityRow] = stop.value
            return rows

    def _candidate(self, problem: Problem, ranking: Ranking, key: str, count: int) -> Candidate:
        return problem.candidate({key: count}, ranking)

    def _stops(self, score: float, dense: float) -> bool:
        value = self.early_stop_value
        if self.early_stop is None or value is None:
            return False
        return {
            "minimize": score < value,
            "maximize": score > value,
            "dropped": score < dense - value,
            "raised": score > dense + value,
        }[self.early_stop]


def write_sensitivity(rows: Sequence[SensitivityRow], folder: Path) -> Mapping[str, Path]:
    """Writes the curves as `sensitivity.parquet` and `sensitivity.csv`; returns their paths."""
    table = pa.Table.from_pylist([vars(row) for row in rows])
    paths = {kind: folder / f"sensitivity.{kind}" for kind in ("parquet", "csv")}
    pyarrow.parquet.write_table(table, paths["parquet"])
    pyarrow.csv.write_csv(table, paths["csv"])
    return paths
