"""The report of a job: one set of cells, as Markdown for MLflow and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from raycompress.results import JobResult, Limit, ModelRow, TrialResult
from raycompress.tracking.cells import markdown_table, number
from raycompress.tracking.front_report import front_section, front_tables
from raycompress.tracking.quantized_report import quantized_section, quantized_table

__all__ = ["cost_table", "models_table", "report_markdown", "report_table", "tables"]


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
        number(params) + share(params, dense.params),
        number(row.macs) + share(row.macs, dense.macs),
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
    return [*found, *front_tables(result), cost_table(result)]


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


def report_markdown(result: JobResult) -> str:
    """The report as Markdown."""
    result = _first(result)
    header = _header(result.score_name, result.dense)
    parts = [f"# {result.name}", ""]
    parts += markdown_table(header, _lines(result))
    parts += [
        "",
        "Masked: parameters are those that aren't zero. Slim: really smaller; times are beside "
        "the dense model's, measured in turns on one device. MB: peak memory of a forward pass "
        "beyond parameters and inputs."
        + (LOWERED if any(trial.quantized for trial in result.trials) else ""),
        "",
    ]
    parts += quantized_section(result)
    parts += front_section(result)
    for trial in result.trials:
        parts += _trial(trial)
    parts += _samples(result)
    parts += ["## Cost", "", *markdown_table(COST_HEADER, _costs(result))]
    parts += [
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
            f"- Budget {limit.resource} {limit.asked}: {number(limit.measured)} of at most "
            f"{number(limit.limit)}, {verdict}{_prediction(limit)}"
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
        lines = []
        for row in ends[:most]:
            name = f"**{row.name}**" if row.best else row.name
            figures = [f"{row.score or 0.0:.4f}", f"{row.loss or 0.0:.4f}"]
            costs = [number(row.macs or 0.0), number(row.params or 0.0)]
            chosen = [_setting(row.settings.get(key, "")) for key in names]
            lines.append([name, *figures, *costs, *chosen])
        parts += markdown_table(header, lines)
        more = f" (the first {most} here)" if len(ends) > most else ""
        parts += ["", f"Bold: no other is better. All are in samples.csv{more}.", ""]
    return parts


def _setting(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _prediction(limit: Limit) -> str:
    if limit.predicted is None:
        return ""
    off = 100 * (limit.predicted / limit.measured - 1)
    return f" (the search counted with {number(limit.predicted)}, {off:+.1f} % off)"
