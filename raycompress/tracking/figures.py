"""Figures of a job; each takes its result and returns a matplotlib figure."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raycompress.results import JobResult

__all__ = ["allocation_figure", "pareto_figure", "search_figure", "sensitivity_figure"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Okabe and Ito's palette, which colour-blind readers tell apart."""


def _axes(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def sensitivity_figure(result: JobResult) -> Figure:
    """Score with one group pruned: a heat map, groups by fraction removed."""
    curves = result.sensitivity
    sparsities = sorted({s for curve in curves for s, _ in curve.points})
    grid = np.full((len(curves), len(sparsities)), np.nan)
    for row, curve in enumerate(curves):
        for sparsity, score in curve.points:
            grid[row, sparsities.index(sparsity)] = score
    height = 1.6 + 0.3 * len(curves)
    figure, axes = _axes(8, height, f"Sensitivity: {result.score_name} with one group pruned")
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:g}%" for s in sparsities])
    axes.set_yticks(range(len(curves)), [f"{c.group} ({c.num})" for c in curves], fontsize=8)
    axes.set_xlabel("fraction removed")
    if len(curves) <= 25:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                colour = "black" if value > middle else "white"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7
                )
    dense = result.dense.score_validation or 0.0
    figure.colorbar(image, ax=axes, label=f"{result.score_name} (dense {dense:.3f})")
    return figure


def allocation_figure(result: JobResult) -> Figure:
    """Fraction of each group that each trial keeps."""
    trials = [trial for trial in result.trials if trial.counts]
    names = list(dict.fromkeys(name for trial in trials for name, _, _ in trial.counts))
    height = 1.6 + len(names) * max(0.3, 0.14 * len(trials))
    figure, axes = _axes(8, height, "What is kept of each group")
    bar = 0.8 / len(trials)
    for index, trial in enumerate(trials):
        kept = {name: (count, num) for name, count, num in trial.counts}
        places = [n + bar * (index - (len(trials) - 1) / 2) for n in range(len(names))]
        values = [kept[n][0] / kept[n][1] if n in kept else np.nan for n in names]
        colour = COLOURS[index % len(COLOURS)]
        axes.barh(places, values, bar * 0.9, color=colour, label=trial.name)
    sizes = {name: num for trial in trials for name, _, num in trial.counts}
    axes.set_yticks(range(len(names)), [f"{n} ({sizes[n]})" for n in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("fraction kept")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def search_figure(result: JobResult) -> Figure:
    """Each step's best loss, and the best so far, against what the search has cost."""
    figure, axes = _axes(8, 4.5, "Search")
    for index, trial in enumerate(t for t in result.trials if t.curve):
        colour = COLOURS[index % len(COLOURS)]
        cost = [step.dfe for step in trial.curve]
        axes.plot(cost, [s.loss for s in trial.curve], ".", color=colour, alpha=0.45)
        axes.plot(
            cost,
            [s.best_loss for s in trial.curve],
            color=colour,
            drawstyle="steps-post",
            label=trial.name,
        )
    axes.set_xlabel("cost in dense-forward equivalents")
    axes.set_ylabel("validation loss before recovery (line: best so far)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def pareto_figure(result: JobResult) -> Figure:
    """Validation score against multiply-adds of every final model, the front joined."""
    figure, axes = _axes(7.5, 4.8, "What each model costs, and what it is worth")
    points = []
    for index, trial in enumerate(result.trials):
        row = trial.rows[-1]
        x, y = 100 * row.macs / max(result.dense.macs, 1), row.score_validation or 0.0
        axes.plot(x, y, "o", color=COLOURS[index % len(COLOURS)], label=trial.name, markersize=8)
        points.append((x, y))
    dense = (100.0, result.dense.score_validation or 0.0)
    axes.plot(*dense, "s", color="black", label="dense", markersize=8)
    front: list[tuple[float, float]] = []
    for x, y in sorted([*points, dense]):
        if not front or y > front[-1][1]:
            front.append((x, y))
    axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0, label="front")
    axes.set_xlabel("multiply-adds, % of the dense model")
    axes.set_ylabel(f"{result.score_name} on validation data")
    axes.legend(frameon=False, fontsize=8)
    return figure
