"""What a report says of fronts: models that no other beats in score and cost."""

from __future__ import annotations

import shlex

from rich.table import Table

from raycompress.results import JobResult
from raycompress.tracking.cells import markdown_table, number

__all__ = ["front_section", "front_tables"]

FRONT_ROWS = 12
"""Points of a front that are shown; they are spread evenly over it."""


def _fronts(result: JobResult) -> list[str]:
    """Resources whose fronts are shown: bytes where models have bits."""
    bits = any(p.bits for p in result.front)
    return ["macs", *(["size_bytes"] if bits else [])] if result.front else []


def _front(result: JobResult, resource: str) -> tuple[list[str], list[list[str]], int]:
    """Header, rows, and how many of the points on a front of score against cost are left out."""
    points = [p for p in result.front if resource in (*p.fronts, *p.search_fronts)]
    points.sort(key=lambda p: (-(getattr(p, resource) or 0), -p.score))
    last = len(points) - 1
    chosen = points
    if last >= FRONT_ROWS:
        chosen = [points[round(i * last / (FRONT_ROWS - 1))] for i in range(FRONT_ROWS)]
    timed = any(p.latency_ms is not None for p in chosen)
    sized = resource == "size_bytes"
    header = ["id", "trial", "model", "on the front", result.score_name, "MACs", "parameters"]
    header += ["predicted ms"] if timed else []
    header += ["bits", "bytes"] if sized else []
    kinds = {"dense": "dense", "final": "final", "search": "before recovery"}
    marks = {(True, True): "both", (True, False): "of all", (False, True): "before recovery"}
    rows = []
    for p in chosen:
        mark = marks[resource in p.fronts, resource in p.search_fronts]
        row = [p.id, p.trial, kinds[p.stage], mark, f"{p.score:.4f}"]
        row += [number(p.macs), number(p.params)]
        if timed:
            row.append("-" if p.latency_ms is None else f"{p.latency_ms:.2f}")
        row += [p.bits or "float", number(p.size_bytes or 0)] if sized else []
        rows.append(row)
    return header, rows, len(points) - len(chosen)


def front_tables(result: JobResult) -> list[Table]:
    """The fronts of everything that was evaluated, for a terminal."""
    return [_table(result, resource) for resource in _fronts(result)]


def _table(result: JobResult, resource: str) -> Table:
    header, rows, more = _front(result, resource)
    by = ", by bytes" if resource == "size_bytes" else ""
    table = Table(
        title=f"Fronts of {result.num_points} evaluated models, validation data{by}",
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


def front_section(result: JobResult) -> list[str]:
    """The same as Markdown; nothing if there are none."""
    parts = []
    for resource in _fronts(result):
        header, rows, left = _front(result, resource)
        if not rows:
            continue
        by = "bytes" if resource == "size_bytes" else "MACs"
        parts += [
            "## Front by bytes" if resource == "size_bytes" else "## Front",
            "",
            f"Of {result.num_points} models that were evaluated, those that no other beats in "
            f"{result.score_name} (validation data) and {by}: among all of them, and among those "
            f"before recovery{f' ({left} more are not shown)' if left else ''}. Everything is in "
            "`pareto.parquet`, with the fronts by parameters, predicted latency and bytes.",
            "",
            *markdown_table(header, ([f"`{row[0]}`", *row[1:]] for row in rows)),
            "",
        ]
    if not parts:
        return []
    more = "; --quantize: quantized" if any(trial.quantized for trial in result.trials) else ""
    parts += [
        "Any of them as a verified model, without searching again:",
        "",
        "```bash",
        f"{_materialize(result)}    # --recover: fine-tuned{more} as well",
        "```",
        "",
    ]
    return parts


def _materialize(result: JobResult) -> str:
    return f"raycompress materialize {shlex.quote(result.output)} --point ID"
