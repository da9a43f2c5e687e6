"""Figures of a job; each takes its result and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raycompress.pareto import Point
from raycompress.quantization.layer_errors import LayerError
from raycompress.results import JobResult, TrialResult

__all__ = [
    "allocation_figure",
    "pareto_figure",
    "quantization_figure",
    "search_figure",
    "sensitivity_figure",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Okabe and Ito's palette, which colour-blind readers tell apart."""


LINES = ("-", "--", ":")
MARKERS = ("o", "^", "D")
"""Told apart by these where there are more trials than colours."""


def _axes(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, x=0.01, ha="left", fontsize="large", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _labels(sizes: Mapping[str, int]) -> list[str]:
    """Names without the path that all of them share, each with its size; none too long."""
    paths = [name.split(".") for name in sizes]
    shared = 0
    while len(paths) > 1 and all(
        len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths
    ):
        shared += 1
    names = [("…" if shared else "") + ".".join(path[shared:]) for path in paths]
    names = [n if len(n) <= 48 else f"{n[:23]}…{n[-24:]}" for n in names]
    return [f"{name} ({num})" for name, num in zip(names, sizes.values(), strict=True)]


def sensitivity_figure(result: JobResult) -> Figure:
    """Score with one group pruned: a heat map, groups by fraction removed."""
    curves = result.sensitivity
    sparsities = sorted({s for curve in curves for s, _ in curve.points})
    grid = np.full((len(curves), len(sparsities)), np.nan)
    for row, curve in enumerate(curves):
        for sparsity, score in curve.points:
            grid[row, sparsities.index(sparsity)] = score
    height = 1.6 + (0.3 if len(curves) <= 25 else 0.17) * len(curves)
    figure, axes = _axes(8, height, f"Sensitivity: {result.score_name} with one group pruned")
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:g}%" for s in sparsities])
    axes.set_yticks(range(len(curves)), _labels({c.group: c.num for c in curves}), fontsize=8)
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
    if len(names) * len(trials) > 60:
        return _allocation_map(trials, names)
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
    axes.set_yticks(range(len(names)), _labels(sizes), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("fraction kept")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _allocation_map(trials: Sequence[TrialResult], names: Sequence[str]) -> Figure:
    """The same as a heat map, which stays legible with many groups or trials."""
    grid = np.full((len(names), len(trials)), np.nan)
    for column, trial in enumerate(trials):
        for name, count, num in trial.counts:
            grid[names.index(name), column] = count / num
    sizes = {name: num for trial in trials for name, _, num in trial.counts}
    figure, axes = _axes(8, 2.6 + 0.17 * len(names), "What is kept of each group")
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(names)), _labels(sizes), fontsize=8)
    places = range(len(trials))
    labels = [trial.name for trial in trials]
    axes.set_xticks(places, labels, fontsize=8, rotation=30, ha="right")
    figure.colorbar(image, ax=axes, label="fraction kept")
    return figure


def search_figure(result: JobResult) -> Figure:
    """Each step's best loss, and the best so far, against what the search has cost."""
    figure, axes = _axes(8, 4.5, "Search")
    for index, trial in enumerate(t for t in result.trials if t.curve):
        colour = COLOURS[index % len(COLOURS)]
        cost = [step.dfe for step in trial.curve]
        axes.plot(cost, [s.loss for s in trial.curve], ".", color=colour, alpha=0.45)
        if len(cost) == 1:  # one-shot: a point, not a curve
            axes.plot(cost, [trial.curve[0].loss], "D", color=colour, label=trial.name)
            continue
        axes.plot(
            cost,
            [s.best_loss for s in trial.curve],
            color=colour,
            drawstyle="steps-post",
            linestyle=LINES[index // len(COLOURS) % len(LINES)],
            label=trial.name,
        )
    axes.set_xlabel("cost in dense-forward equivalents")
    axes.set_ylabel("validation loss before recovery (line: best so far)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def quantization_figure(rows: Sequence[LayerError]) -> Figure:
    """What rounding does to each layer: ratios of signal to noise, in dB."""
    figure, axes = _axes(8, 1.9 + 0.22 * len(rows), "Quantization: signal to noise of each layer")
    parts = (
        ("weight_sqnr", "weight", "s"),
        ("input_sqnr", "input", "^"),
        ("output_sqnr", "output, this layer alone quantized", "o"),
        ("chain_sqnr", "output, all layers quantized", "D"),
    )
    for (part, label, marker), colour in zip(parts, COLOURS, strict=False):
        known = [(getattr(row, part), y) for y, row in enumerate(rows)]
        known = [(x, y) for x, y in known if x is not None and np.isfinite(x)]
        if known:
            x, y = zip(*known, strict=True)
            axes.plot(x, y, marker, color=colour, label=label, markersize=5, alpha=0.8)
    names = [f"{row.layer} (W{row.weight_bits or '-'} A{row.input_bits or '-'})" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("SQNR in dB: 6 dB more are one bit more")
    if axes.lines:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


AXES = {
    "macs": "multiply-adds",
    "params": "parameters",
    "latency_ms": "predicted latency",
    "size_bytes": "bytes",
}


def pareto_figure(result: JobResult, points: Sequence[Point]) -> Figure:
    """Validation score of everything evaluated against its cost, and the fronts.

    One panel for each resource; costs are fractions of the dense model's. Models with bits stand in
    that of bytes alone. The scale of scores is that of fronts and final models; what is far below
    stands at its lower end.
    """
    studies = {row.name: row.study for row in result.samples}
    points = [  # the samples of a study look alike
        replace(p, trial=studies.get(p.trial, p.trial)) if p.stage == "search" else p
        for p in points
    ]
    resources = [r for r in AXES if any(getattr(p, r) is not None for p in points)]
    if not any(p.bits for p in points):  # in float, bytes tell what parameters do
        resources = [r for r in resources if r != "size_bytes"]
    figure = Figure(figsize=(1.2 + 3.6 * len(resources), 4.9), layout="constrained")
    num = len({p.id for p in points})
    figure.suptitle(
        f"{num} models evaluated (small: as judged in a search; large: final)",
        x=0.01,
        ha="left",
        fontsize="large",
        fontweight="bold",
    )
    told = [p.score for p in points if p.fronts or p.search_fronts or p.stage != "search"]
    top, low = max(told), min(told)
    low -= 0.25 * (top - low) or 0.05 * abs(top) or 0.05
    panels = figure.subplots(1, len(resources), sharey=True, squeeze=False)[0]
    for axes, resource in zip(panels, resources, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(f"{AXES[resource]}, % of the dense model")
        _panel(axes, resource, points, low, set(studies.values()))
    panels[0].set_ylim(low - 0.03 * (top - low), top + 0.06 * (top - low))
    panels[0].set_ylabel(f"{result.score_name} on validation data")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _panel(
    axes: Axes, resource: str, points: Sequence[Point], low: float, studies: Set[str]
) -> None:
    dense = next(p for p in points if p.stage == "dense")
    if resource != "size_bytes":
        points = [p for p in points if not p.bits]
    whole = max(getattr(dense, resource), 1e-12)

    def draw(some: Sequence[Point], marker: str, **style: Any) -> None:
        some = [p for p in some if getattr(p, resource) is not None]
        x = [100 * getattr(p, resource) / whole for p in some]
        axes.plot(x, [max(p.score, low) for p in some], marker, linestyle="none", **style)

    names = list(dict.fromkeys(p.trial for p in points if p.trial))
    for index, name in enumerate(names):
        marker = MARKERS[index // len(COLOURS) % 3]
        own = [p for p in points if p.trial == name]
        finished = name in studies or any(p.stage == "final" for p in own)
        for final in (False, True):
            some = [p for p in own if (p.stage == "final") == final and p.complete]
            draw(
                [p for p in some if p.score >= low],
                marker,
                color=COLOURS[index % len(COLOURS)],
                markersize=8 if final else 3.5,
                alpha=1.0 if final else 0.45,
                markeredgecolor="white" if final else "none",
                label=(name if finished else f"{name} (no model)") if final else None,
            )
    faint = {"color": "#999999", "markersize": 3.5, "alpha": 0.6}
    if not all(p.complete for p in points):
        some = [p for p in points if not p.complete]
        draw(some, "x", label="seen on a part of the data", **faint)
    below = [p for p in points if p.complete and p.score < low]
    if below:
        draw(below, "v", label="further down", **faint)
    draw([dense], "s", color="black", label="dense", markersize=7)
    for field, line, label in (
        ("search_fronts", ":", "front before recovery"),
        ("fronts", "-", "front"),
    ):
        on = sorted(
            (p for p in points if resource in getattr(p, field)),
            key=lambda p: (getattr(p, resource), p.score),
        )
        draw(on, "o", markerfacecolor="none", markeredgecolor="#333333", markersize=5.5)
        # With at most so much to spend, this is the best: it holds until a better one is in reach.
        x = [100 * getattr(p, resource) / whole for p in on]
        scores = [p.score for p in on]
        axes.step(
            x, scores, line, where="post", label=label, color="#555555", linewidth=1.2, zorder=0
        )
