"""What a report says of quantized models: each beside the float model on the same runtime."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from raycompress.results import JobResult, Latency, ModelRow, TrialResult
from raycompress.tracking.cells import markdown_table

__all__ = ["latency_note", "quantized_section", "quantized_table"]


def quantized_table(result: JobResult) -> Table | None:
    """The models that were lowered, for a terminal; None if there are none."""
    header, rows = _cells(result)
    if not rows:
        return None
    table = Table(
        title=_title(result),
        title_justify="left",
        title_style="bold",
        caption="float and quantized models timed in turns on one runtime; size x latency: file "
        "times ms at the first batch size, of the first row's",
        caption_justify="left",
    )
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row, style="dim" if row[0].endswith("float") else "")
    return table


def quantized_section(result: JobResult) -> list[str]:
    """The same as Markdown, with what is in float and why; nothing if no model is quantized."""
    parts = []
    header, rows = _cells(result)
    if rows:
        parts += [f"## {_title(result)}", ""]
        parts += markdown_table(header, rows)
        parts += [
            "",
            "Float and quantized models are timed in turns on one runtime and one device. In "
            "integers: layers that really run so, of those that are to. As simulated: test "
            "examples with the same largest output as in simulation, and the relative difference "
            "of outputs. Size x latency: file times ms at the first batch size, of the first "
            "row's.",
            "",
        ]
    for trial in _quantized(result):
        quantized = trial.quantized
        assert quantized is not None
        if quantized.in_float:
            parts += [
                f"{trial.name}: in float, since their types can't be quantized: "
                f"{', '.join(quantized.in_float)}.",
                "",
            ]
        if quantized.kept_float:
            parts += [
                f"{trial.name}: {quantized.num_layers} layers are quantized; in float stay "
                f"{', '.join(quantized.kept_float)}.",
                "",
            ]
        parts += [line for note in latency_note(trial) for line in (note, "")]
        if quantized.runs == "simulation":
            where = f"stored as {quantized.backend}, " if quantized.backend else "not lowered: "
            parts += [
                f"{trial.name}: {quantized.num_layers} layers with {quantized.bits}, {where}they "
                "run in simulation, in float.",
                "",
            ]
    return parts


def latency_note(trial: TrialResult) -> list[str]:
    """Of a search within a limit on measured latency, in words; of others nothing."""
    figures: dict[str, float] = {}
    for step in trial.curve:
        figures |= step.figures
    if "latency_limit_ms" not in figures:
        return []
    note = (
        f"{trial.name}: limit on latency {figures['latency_limit_ms']:.3g} ms, of "
        f"{figures['latency_float_ms']:.3g} ms in float on the same runtime; what was found was "
        f"predicted to take {figures['latency_ms']:.3g} ms and timed at "
        f"{figures['latency_timed_ms']:.3g} ms."
    )
    if "latency_error" in figures:
        note += (
            f" Predictions were off by {100 * figures['latency_error']:.0f} % in the mean of "
            "mixtures that were timed for that."
        )
    return [note]


def _title(result: JobResult) -> str:
    first = next(t.quantized for t in _quantized(result) if t.quantized and t.quantized.backend)
    return f"On {first.backend}"


def _quantized(result: JobResult) -> list[TrialResult]:
    return [trial for trial in result.trials if trial.quantized is not None]


def _cells(result: JobResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for each model that was lowered its float twin, then itself."""
    trials = [t for t in _quantized(result) if t.quantized and t.quantized.backend]
    trials.sort(key=lambda trial: bool(trial.pruner))  # the dense model first
    timed = next((trial.rows[-1].latency for trial in trials if trial.rows[-1].latency), ())
    sizes = [latency.batch_size for latency in timed]
    header = ["model", "bits", "in integers", f"{result.score_name} test", "as simulated", "file"]
    header += [f"ms, batch {size}" for size in sizes]
    header += ["size x latency"] if sizes else []
    rows: list[list[str]] = []
    base = 0.0
    for trial in trials:
        quantized, own = trial.quantized, trial.row("lowered")
        assert quantized is not None and own is not None
        before = _before(trial)
        cost = _cost(quantized.float_bytes, quantized.float_latency)
        base = base or cost
        rows.append(
            [
                *(f"{trial.name}: float", "-", "-", _score(before), "-"),
                _size(quantized.float_bytes),
                *(
                    [f"{each.median_ms:.3f}" for each in quantized.float_latency]
                    or ["-"] * len(sizes)
                ),
                *([f"{cost / base:.3f}" if cost and base else "-"] if sizes else []),
            ]
        )
        layers = f"{quantized.layers_integer} of {quantized.layers_asked}"
        if quantized.kept_float:
            layers += f", {len(quantized.kept_float)} in float"
        same = "" if quantized.agreement is None else f"{100 * quantized.agreement:.2f} %, "
        share = quantized.file_bytes / max(quantized.float_bytes, 1)
        cost = _cost(quantized.file_bytes, own.latency)
        rows.append(
            [
                f"{trial.name}: {quantized.quantizer}",
                quantized.bits,
                layers if quantized.runs == "integers" else "in simulation",
                _score(own),
                f"{same}{quantized.difference:.3f}",
                f"{_size(quantized.file_bytes)} ({100 * share:.0f}%)",
                *(
                    [
                        f"{each.median_ms:.3f}, {slow.median_ms / each.median_ms:.2f}x"
                        for each, slow in zip(own.latency, quantized.float_latency, strict=True)
                    ]
                    or ["-"] * len(sizes)
                ),
                *([f"{cost / base:.3f}" if cost and base else "-"] if sizes else []),
            ]
        )
    return header, rows


def _before(trial: TrialResult) -> ModelRow:
    """The float model that was quantized."""
    names = [row.name for row in trial.rows]
    return trial.rows[names.index("quantized") - 1]


def _cost(num_bytes: int, latency: Sequence[Latency]) -> float:
    return num_bytes * latency[0].median_ms if latency else 0.0


def _score(row: ModelRow) -> str:
    return "-" if row.score_test is None else f"{row.score_test:.4f}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:.1f} kB"
