"""A latency table: measured once on the device, it prices any kept counts without building a model.

latency = overhead + scale * (sum over layers of each layer's own time)

A layer (any module that runs, itself without its children) whose work depends on the kept counts
of one or two channel groups has a grid of times measured in really slim models (see
`latency_design`), and is interpolated in between: linearly for one group, bilinearly for two. One
that depends on more groups (a convolution after a concatenation, a forward that calls operators
itself) gets non-negative rates, fitted to the same measurements: a constant, a rate for each byte
that it writes and one for each multiply-add. So does what no layer of the cost model accounts for,
which is all where slim models are in graph form. Overhead and scale are fitted to passes of the
same models without hooks, such that the dense model's latency is right.

Random slim models that were measured for nothing else say how far off the predictions are.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy  # its parts load when they are used first: replicas need none
import torch
from numpy.typing import NDArray
from torch import nn

from raycompress.errors import StructureError
from raycompress.structure.cost import CostModel, Ints
from raycompress.structure.latency.design import FRACTIONS, Design, layer_groups
from raycompress.structure.latency.layer_times import Visit
from raycompress.structure.latency.measure import Inputs
from raycompress.structure.latency.points import device_name, measure_points
from raycompress.structure.model import Structure

__all__ = ["LatencyTable", "TableError", "latency_table"]

REST = "(rest)"
"""Stands for all that is no layer."""

_log = logging.getLogger(__name__)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TableError:
    """How far predictions are from measured latency, relative to what was measured.

    Attributes:
        num: random slim models that were compared.
        mean: mean of the absolute relative errors.
        max: the largest.
        bias: mean of the signed ones; above 0: predictions are too high.
    """

    num: int
    mean: float
    max: float
    bias: float

    @staticmethod
    def of(predicted: Sequence[float] | Floats, measured: Sequence[float] | Floats) -> TableError:
        """Compares latencies in any unit."""
        off = np.asarray(predicted) / np.asarray(measured) - 1
        if not len(off):
            return TableError(0, 0.0, 0.0, 0.0)
        size = np.abs(off)
        return TableError(len(off), float(size.mean()), float(size.max()), float(off.mean()))


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Prices kept counts. Picklable; holds no tensor or module.

    Attributes:
        device: name of the processor.
        batch_size: examples in a pass.
        sizes: of the structure.
        levels: measured kept counts of each group, shape (groups, q).
        layers: names of the layers with a grid.
        first: group along the first axis of each grid, shape (layers,).
        second: group along the second axis, or the first again, shape (layers,).
        grids: microseconds, shape (layers, q, q).
        rated: names of the layers with rates; the last stands for all that is no layer.
        places: their positions among the cost model's layers, shape (rated,).
        rates: microseconds: constant, for each byte, for each multiply-add, shape (rated, 3).
        overhead_ms: milliseconds of a pass outside of all layers; below 0 where hooks cost more.
        scale: of all layers' times.
        error: against random slim models.
        residual: against the slim models that the table is made of.
        digest: of all times, as 16 hex digits.
    """

    device: str
    batch_size: int
    sizes: CostModel
    levels: Ints
    layers: tuple[str, ...]
    first: Ints
    second: Ints
    grids: Floats
    rated: tuple[str, ...]
    places: Ints
    rates: Floats
    overhead_ms: float
    scale: float
    error: TableError
    residual: TableError
    digest: str

    @property
    def dense_ms(self) -> float:
        """Latency of the dense model, in milliseconds."""
        return self.latency_ms()

    def latency_ms(self, kept: Mapping[str, int] | None = None) -> float:
        """Predicted latency with `kept[group]` channels; groups left out stay whole."""
        counts = self._counts(kept)
        total = self._grid_times(counts).sum() + self._rated_times(counts).sum()
        return float(self.overhead_ms + self.scale * total / 1e3)

    def layers_ms(self, kept: Mapping[str, int] | None = None) -> dict[str, float]:
        """Each layer's part of the predicted latency, in milliseconds, without the overhead.

        What no layer accounts for stands under "(rest)".
        """
        counts = self._counts(kept)
        times = np.concatenate([self._grid_times(counts), self._rated_times(counts)])
        named = dict(zip((*self.layers, *self.rated), self.scale * times / 1e3, strict=True))
        return {name: float(named[name]) for name in (*self.sizes.layers, REST)}

    def _counts(self, kept: Mapping[str, int] | None) -> Ints:
        counts = self.sizes.full.copy()
        for name, count in (kept or {}).items():
            if name not in self.sizes.index:
                raise StructureError(f"no channel group {name!r}")
            counts[self.sizes.index[name]] = count
        return counts

    def _grid_times(self, counts: Ints) -> Floats:
        q = self.levels.shape[1]
        rows = np.arange(len(counts))
        low = np.clip((self.levels <= counts[:, None]).sum(axis=1) - 1, 0, q - 2)
        start, end = self.levels[rows, low], self.levels[rows, low + 1]
        share = np.clip((counts - start) / np.maximum(end - start, 1), 0.0, 1.0)
        at = np.arange(len(self.layers))
        i, j = low[self.first], low[self.second]
        u, v = share[self.first], share[self.second]
        g = self.grids
        times: Floats = (1 - u) * ((1 - v) * g[at, i, j] + v * g[at, i, j + 1])
        times += u * ((1 - v) * g[at, i + 1, j] + v * g[at, i + 1, j + 1])
        return times

    def _rated_times(self, counts: Ints) -> Floats:
        costs = _layer_costs(self.sizes, counts)[self.places]
        times: Floats = (self.rates * costs).sum(axis=1)
        return times


def _layer_costs(sizes: CostModel, counts: Ints) -> Floats:
    """1, bytes written and multiply-adds of each layer in the traced pass, and of all of them.

    Shape (layers + 1, 3).
    """
    terms = sizes.values(counts)[sizes.layer_factors].prod(axis=1)
    costs = np.ones((len(sizes.layers) + 1, 3))
    for column, kind in ((1, 2), (2, 1)):
        amounts = sizes.layer_coefficients[kind] * terms
        costs[:-1, column] = np.bincount(sizes.owner, amounts, minlength=len(sizes.layers))
        costs[-1, column] = amounts.sum()
    return costs


def latency_table(
    model: nn.Module,
    structure: Structure,
    inputs: Callable[[int], Inputs] | Inputs,
    *,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    folder: str | Path | None = None,
    levels: int = 5,
    checks: int = 8,
    visits: int = 5,
    passes: int = 3,
    max_seconds: float = 300.0,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyTable:
    """Measures a table, or takes what is measured already from a folder.

    The cost: at most `levels ** 2 + checks` slim models, each run `visits * (2 * passes + 1)`
    times; by default 33 models, 35 times each, hence some 600 dense passes.

    Args:
        model: the dense model that was analysed; which weights it has doesn't matter.
        structure: its structure.
        inputs: function of the batch size, or example inputs, whose tensors are repeated or cut
            along the first dim.
        batch_size: examples in a pass.
        device: where; the model's own if not given.
        folder: measured points are kept here, in a file for each combination of device, torch
            version, threads, dtype, batch size and model; None: nowhere.
        levels: kept counts of each group on the grid: 3, 5 or 7.
        checks: random slim models to measure the table's error with.
        visits: times that each model is built and timed; the fastest visit counts.
        passes: timed passes of a visit; their median counts. Fewer if time is short.
        max_seconds: aimed at; see `measure_points`.
        clock: seconds, for tests.

    Raises:
        StructureError: nothing can be pruned, or `levels` isn't one of the three.
    """
    if levels not in FRACTIONS:
        raise StructureError(
            f"levels must be one of {', '.join(map(str, FRACTIONS))}, got {levels}"
        )
    if not structure.groups:
        raise StructureError("a latency table needs channel groups, and the model has none")
    if device is None:
        device = next((p.device for p in model.parameters()), "cpu")
    device = torch.device(device)
    design = Design.of(structure, levels, checks)
    visited = measure_points(
        model,
        structure,
        design,
        inputs,
        batch_size=batch_size,
        device=device,
        folder=None if folder is None else Path(folder),
        visits=visits,
        passes=passes,
        max_seconds=max_seconds,
        clock=clock,
    )
    table = _fitted(structure.sizes, design, visited, device_name(device), batch_size)
    _log.info(
        "latency table for %s, batch size %d: dense %.3f ms; against %d random slim models its "
        "mean error is %.1f %%, the largest %.1f %%",
        table.device, batch_size, table.dense_ms, table.error.num,
        100 * table.error.mean, 100 * table.error.max,
    )  # fmt: skip
    return table


def _fitted(
    sizes: CostModel,
    design: Design,
    visited: Sequence[Sequence[Visit]],
    device: str,
    batch_size: int,
) -> LatencyTable:
    whole = np.array([min(visit.whole for visit in visits) for visits in visited]) / 1e3
    own = np.array([np.min([visit.layers for visit in visits], axis=0) for visits in visited])
    num = len(design.counts)
    q = design.levels.shape[1]
    layers, first, second, grids, rated, rates = [], [], [], [], [], []
    costs = np.array([_layer_costs(sizes, counts) for counts in design.counts])
    for at, (name, groups) in enumerate(layer_groups(sizes).items()):
        times = own[:num, at]
        if len(groups) > 2 or (len(groups) == 2 and _same(design, groups)):
            rated.append(name)
            rates.append(_rates(costs[:, at], times))
            continue
        layers.append(name)
        first.append(groups[0] if groups else 0)
        second.append(groups[-1] if groups else 0)
        grids.append(_grid(design, groups, times, q))
    rated.append(REST)
    rates.append(_rates(costs[:, -1], own[:num, -1]))
    table = LatencyTable(
        device=device,
        batch_size=batch_size,
        sizes=sizes,
        levels=design.levels,
        layers=tuple(layers),
        first=np.array(first, dtype=np.int64),
        second=np.array(second, dtype=np.int64),
        grids=np.array(grids).reshape(-1, q, q),
        rated=tuple(rated),
        places=np.array([[*sizes.layers, REST].index(name) for name in rated], dtype=np.int64),
        rates=np.array(rates).reshape(-1, 3),
        overhead_ms=0.0,
        scale=1.0,
        error=TableError.of((), ()),
        residual=TableError.of((), ()),
        digest="",
    )
    names = list(sizes.index)
    all_counts = np.concatenate([design.counts, design.checks])
    kept = [dict(zip(names, map(int, row), strict=True)) for row in all_counts]
    sums = np.array([table.latency_ms(each) for each in kept])
    scale = _scale(sums[:num], whole[:num])
    overhead = float(whole[0] - scale * sums[0])
    predicted = overhead + scale * sums
    content = hashlib.sha256(whole.tobytes() + own.tobytes() + design.counts.tobytes())
    return replace(
        table,
        overhead_ms=overhead,
        scale=scale,
        error=TableError.of(predicted[num:], whole[num:]),
        residual=TableError.of(predicted[:num], whole[:num]),
        digest=content.hexdigest()[:16],
    )


def _same(design: Design, groups: tuple[int, ...]) -> bool:
    """Whether two groups have one colour, so that not all of their pairs were measured."""
    return bool(design.colours[groups[0]] == design.colours[groups[1]])


def _grid(design: Design, groups: tuple[int, ...], times: Floats, q: int) -> Floats:
    """Times at each pair of levels, shape (q, q); medians where several points share a pair."""
    i, j = design.places.T
    at = [(i + design.colours[g] * j) % q for g in groups]
    grid = np.full((q, q), np.median(times))
    for a in range(q):
        if len(groups) == 1:
            grid[a, :] = np.median(times[at[0] == a])
        for b in range(q if len(groups) == 2 else 0):
            grid[a, b] = times[(at[0] == a) & (at[1] == b)][0]
    return grid


def _rates(costs: Floats, times: Floats) -> Floats:
    """Non-negative rates for 1, bytes and multiply-adds with the smallest relative squares."""
    units = np.maximum(costs.max(axis=0), 1e-9)
    weights = 1 / np.maximum(times, 1e-3)
    found, _ = scipy.optimize.nnls(costs / units * weights[:, None], times * weights)
    return np.asarray(found / units)


def _scale(sums: Floats, whole: Floats) -> float:
    """Slope of the line through the dense model (the first) with the smallest relative squares."""
    x, y = (sums - sums[0]) / whole, (whole - whole[0]) / whole
    slope = float(x @ y) / max(float(x @ x), 1e-12)
    return slope if slope > 0 else float(whole[0] / sums[0])
