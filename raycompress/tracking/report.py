"""The report of a job: one set of cells, as Markdown for MLflow and as a table for a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.table import Table

from raycompress.results import JobResult, Limit, ModelRow, TrialResult
from raycompress.tracking.quantized_report import quantized_section, quantized_table

__all__ = ["cost_table", "front_table", "models_table", "report_markdown", "report_table", "tables"]

FRONT_ROWS = 12
"""Points of a front that are shown; they are spread evenly over it."""


def _materialize(result: JobResult) -> str:
    return f"raycompress materialize {shlex.quote(result.output)} --point ID"


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def _header(name: str, dense: ModelRow) -> list[str]:
    sizes = [latency.batch_size for latency in dense.latency]
    latencies = [
        title for size in sizes for title in (f"ms, batch {size} (p10-p90)", f"MB, batch {size}")
    ]
    return [
        "model",
        f"{name} validation",
        f"{name} test",
        "parameters",
        "MACs",
        *latencies,
        "file",
    ]


def _cells(row: ModelRow, label: str, dense: ModelRow) -> list[str]:
    def share(value: float, whole: float) -> str:
        return "" if row is dense else f" ({100 * value / max(whole, 1):.0f}%)"

    params = row.nonzero_params if row.name == "masked" else row.params
    latency = []
    for base in dense.latency:
        entry = row.at(base.batch_size)
        if entry is None:  # in simulation
            latency += ["-", "-"]
            continue
        times = f"{entry.median_ms:.2f} ({entry.p10_ms:.2f}-{entry.p90_ms:.2f})"
        if row.name == "slim":
            times += f", {base.median_ms / entry.median_ms:.2f}x"
        # What another runtime takes isn't known.
        peak = "-" if row.name == "lowered" else f"{entry.peak_bytes / 1e6:.3g}"
        latency += [times, peak]

    def score(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    return [
        label,
        score(row.score_validation),
        score(row.score_test),
        _number(params) + share(params, dense.params),
        _number(row.macs) + share(row.macs, dense.macs),
        *latency,
        f"{row.file_bytes / 1e3:.0f} kB" + share(row.file_bytes, dense.file_bytes),
    ]


def _lines(result: JobResult) -> list[list[str]]:
    lines = [_cells(result.dense, "dense", result.dense)]
    for trial in result.trials:
        base = trial.row("dense") or result.dense
        for row in trial.rows:
            if row.name != "dense":
                lines.append(_cells(row, f"{trial.name}: {row.name}", base))
            elif not result.dense.latency:
                lines[0] = _cells(row, "dense", row)
    return lines


def _first(result: JobResult) -> JobResult:
    """Latency columns are those of the first trial; each trial timed the dense model anew."""
    from dataclasses import replace

    row = next((trial.row("dense") for trial in result.trials if trial.rows), None)
    return result if row is None or result.dense.latency else replace(result, dense=row)


def tables(result: JobResult) -> list[Table]:
    """All that a terminal is shown."""
    quantized = quantized_table(result)
    found = [report_table(result), *([] if quantized is None else [quantized])]
    return [*found, *([front_table(result)] if result.front else []), cost_table(result)]


def report_table(result: JobResult) -> Table:
    """The final table, for a terminal."""
    result = _first(result)
    # The dense row is the first trial's, so that other trials' ratios don't follow from it.
    several = sum(bool(trial.rows) for trial in result.trials) > 1
    table = Table(
        title=result.name,
        title_justify="left",
        title_style="bold",
        caption="1.5x: against the dense model timed in turns with it" if several else None,
        caption_justify="left",
    )
    for index, name in enumerate(_header(result.score_name, result.dense)):
        table.add_column(name, justify="left" if index == 0 else "right")
    for line in _lines(result):
        table.add_row(*line, style="dim" if line[0].endswith(("masked", "quantized")) else "")
    return table


def models_table(title: str, score_name: str, rows: Sequence[ModelRow]) -> Table:
    """A few models beside the dense one, which is the first of them; for a terminal."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(_header(score_name, rows[0])):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*_cells(row, row.name, rows[0]), style="dim" if row.name == "masked" else "")
    return table


def _front(result: JobResult) -> tuple[list[str], list[list[str]], int]:
    """Header, rows, and how many of the points on a front of score against MACs are left out."""
    points = [p for p in result.front if "macs" in (*p.fronts, *p.search_fronts)]
    last = len(points) - 1
    chosen = points
    if last >= FRONT_ROWS:
        chosen = [points[round(i * last / (FRONT_ROWS - 1))] for i in range(FRONT_ROWS)]
    timed = any(p.latency_ms is not None for p in chosen)
    header = ["id", "trial", "model", "on the front", result.score_name, "MACs", "parameters"]
    header += ["predicted ms"] if timed else []
    kinds = {"dense": "dense", "final": "final", "search": "before recovery"}
    marks = {(True, True): "both", (True, False): "of all", (False, True): "before recovery"}
    rows = []
    for p in chosen:
        mark = marks["macs" in p.fronts, "macs" in p.search_fronts]
        row = [p.id, p.trial, kinds[p.stage], mark, f"{p.score:.4f}"]
        row += [_number(p.macs), _number(p.params)]
        if timed:
            row.append("-" if p.latency_ms is None else f"{p.latency_ms:.2f}")
        rows.append(row)
    return header, rows, len(points) - len(chosen)


def front_table(result: JobResult) -> Table:
    """The front of everything that was evaluated, for a terminal."""
    header, rows, more = _front(result)
    table = Table(
        title=f"Fronts of {result.num_points} evaluated models, validation data",
        title_justify="left",
        title_style="bold",
        caption=(f"{more} more, and everything else, in " if more else "everything is in ")
        + f"results/pareto.parquet; {_materialize(result)}",
        caption_justify="left",
    )
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 4 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


LOWERED = (
    " Quantized: with the numbers that integers would have, in float. Lowered: on its runtime, "
    "whose times are compared with those of float models on the same one below."
)
COST_HEADER = ["search", "DFE", "candidates", "from the ledger", "s"]


def _costs(result: JobResult) -> list[list[str]]:
    rows = [
        [t.name, f"{t.dfe:.1f}", str(t.evaluations), str(t.replayed), f"{t.seconds:.1f}"]
        for t in result.trials
        if t.pruner
    ]
    whole = ["whole job, this run", f"{result.run_dfe:.1f}", "", "", f"{result.seconds:.1f}"]
    return [*rows, whole, ["whole job, earlier runs too", f"{result.dfe:.1f}", "", "", ""]]


def cost_table(result: JobResult) -> Table:
    """What searches and the whole job cost, for a terminal."""
    table = Table(title="Cost", title_justify="left", title_style="bold")
    for index, name in enumerate(COST_HEADER):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in _costs(result):
        table.add_row(*row)
    return table


def _front_section(result: JobResult) -> list[str]:
    header, rows, more = _front(result)
    if not rows:
        return []
    parts = [
        "## Front",
        "",
        f"Of {result.num_points} models that were evaluated, those that no other beats in "
        f"{result.score_name} (validation data) and MACs: among all of them, and among those "
        f"before recovery{f' ({more} more are not shown)' if more else ''}. Everything is in "
        "`pareto.parquet`, with the fronts by parameters and predicted latency.",
        "",
        _row(header),
        _row(["---"] * len(header)),
        *(_row([f"`{row[0]}`", *row[1:]]) for row in rows),
        "",
        "Any of them as a verified model, without searching again:",
        "",
        "```bash",
        f"{_materialize(result)}    # --recover: fine-tuned as well",
        "```",
        "",
    ]
    return parts


def report_markdown(result: JobResult) -> str:
    """The report as Markdown."""
    result = _first(result)
    header = _header(result.score_name, result.dense)
    parts = [f"# {result.name}", ""]
    parts += [_row(header), _row(["---"] * len(header)), *(_row(line) for line in _lines(result))]
    parts += [
        "",
        "Masked: parameters are those that aren't zero. Slim: really smaller; times are beside "
        "the dense model's, measured in turns on one device. MB: peak memory of a forward pass "
        "beyond parameters and inputs."
        + (LOWERED if any(trial.quantized for trial in result.trials) else ""),
        "",
    ]
    parts += quantized_section(result)
    parts += _front_section(result)
    for trial in result.trials:
        parts += _trial(trial)
    parts += _samples(result)
    parts += ["## Cost", "", _row(COST_HEADER), _row(["---"] * len(COST_HEADER))]
    parts += [
        *(_row(row) for row in _costs(result)),
        "",
        "DFE: dense-forward equivalents; 1 is one pass of the dense model over the validation "
        "data. A search is charged for all that it asked for, also what the ledger answered; the "
        "job for what was really done, probes, fine-tuning and measured models included.",
        "",
    ]
    if result.model_uri:
        parts += ["## Use the model", "", "```python", "import mlflow.pytorch", ""]
        parts += [
            f"mlflow.set_tracking_uri({result.tracking_uri!r})",
            f"model = mlflow.pytorch.load_model({result.model_uri!r})",
            "```",
            "",
        ]
    if result.frozen:
        parts += ["## What can't be pruned", ""]
        parts += [f"- `{each.name}`: {each.reason}" for each in result.frozen[:40]]
        parts.append("")
    parts += ["## Notes", "", *(f"- {note}" for note in result.notes)]
    parts.append(f"- Latency was measured on: {result.device}")
    return "\n".join(parts) + "\n"


def _trial(trial: TrialResult) -> list[str]:
    lines = [f"## {trial.name}", ""]
    if trial.failure is not None:
        lines.append(f"- FAILED: {trial.failure}")
    if trial.stopped is not None:
        best = f"; its best score so far was {trial.curve[-1].best_score:.4f}"
        lines.append(f"- STOPPED after step {trial.stopped}: others were ahead{best}")
    for limit in trial.limits:
        verdict = "met" if limit.met else "NOT met"
        lines.append(
            f"- Budget {limit.resource} {limit.asked}: {_number(limit.measured)} of at most "
            f"{_number(limit.limit)}, {verdict}{_prediction(limit)}"
        )
    if trial.verification is not None:
        reasons = "; ".join(trial.verification.reasons)
        lines.append(
            f"- Slim against masked: {trial.verification.kind}, largest relative error "
            f"{trial.verification.max_error:.1e}{f' ({reasons})' if reasons else ''}"
        )
        if trial.verification.reference_error is not None:
            lines.append(
                "- Slim against masked with these operations over the kept channels only: largest "
                f"relative error {trial.verification.reference_error:.1e}"
            )
    if not trial.pruner:
        return [*lines, "- The dense model, quantized", ""]
    lines.append(
        f"- Search: {trial.dfe:.1f} dense-forward equivalents, {trial.evaluations} candidates "
        f"evaluated, {trial.replayed} answered by the ledger, {trial.seconds:.1f} s"
    )
    return [*lines, ""]


def _samples(result: JobResult, most: int = 20) -> list[str]:
    """A table for each study: its best samples, by score."""
    parts = []
    for study in dict.fromkeys(row.study for row in result.samples):
        rows = [row for row in result.samples if row.study == study]
        states = [row.state for row in rows]
        counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        ends = sorted(
            (row for row in rows if row.state == "finished"),
            key=lambda row: (not row.best, -(row.score or 0.0)),
        )
        names = list(dict.fromkeys(name for row in rows for name in row.settings))
        parts += [f"## Samples of {study}", "", f"{len(rows)} samples: {counts}.", ""]
        header = ["sample", result.score_name, "loss", "MACs", "parameters", *names]
        parts += [_row(header), _row(["---"] * len(header))]
        for row in ends[:most]:
            name = f"**{row.name}**" if row.best else row.name
            figures = [f"{row.score or 0.0:.4f}", f"{row.loss or 0.0:.4f}"]
            costs = [_number(row.macs or 0.0), _number(row.params or 0.0)]
            chosen = [_setting(row.settings.get(key, "")) for key in names]
            parts.append(_row([name, *figures, *costs, *chosen]))
        more = f" (the first {most} here)" if len(ends) > most else ""
        parts += ["", f"Bold: no other is better. All are in samples.csv{more}.", ""]
    return parts


def _setting(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _prediction(limit: Limit) -> str:
    if limit.predicted is None:
        return ""
    off = 100 * (limit.predicted / limit.measured - 1)
    return f" (the search counted with {_number(limit.predicted)}, {off:+.1f} % off)"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
