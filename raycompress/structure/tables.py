"""Rows of frozen dataclasses as CSV, JSON, or tables for a terminal."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycompress.structure.model import Structure
from raycompress.structure.topology import (
    LayerRow,
    channel_dependencies,
    frozen_dims,
    layer_rows,
    step_dependencies,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["layer_view", "overview", "to_csv", "to_json", "to_plain", "to_table", "topology"]

WIDE = 110  # columns from which shapes have room


def topology(structure: Structure) -> dict[str, Sequence[DataclassInstance]]:
    """All tables of a structure by name, as `raycompress analyze` exports them."""
    return {
        "groups": channel_dependencies(structure),
        "steps": step_dependencies(structure),
        "frozen": structure.frozen,
        "layers": layer_rows(structure),
    }


def to_plain(rows: Sequence[DataclassInstance]) -> list[dict[str, Any]]:
    """Rows as dicts of JSON's types, but for tuples."""
    return [dataclasses.asdict(row) for row in rows]


def to_json(rows: Sequence[DataclassInstance], path: str | Path) -> None:
    """Writes a list with an object for each row."""
    Path(path).write_text(json.dumps(to_plain(rows), indent=1) + "\n")


def to_csv(rows: Sequence[DataclassInstance], path: str | Path) -> None:
    """Writes a header and a line for each row; what has several parts is joined by spaces.

    Raises:
        ValueError: there are no rows, so no header is known.
    """
    if not rows:
        raise ValueError(f"no rows to write to {path}")
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f.name for f in dataclasses.fields(rows[0])]
        writer.writerow(names)
        for row in rows:
            values = (getattr(row, name) for name in names)
            writer.writerow([" ".join(map(str, v)) if isinstance(v, tuple) else v for v in values])


def to_table(
    rows: Sequence[DataclassInstance], title: str, columns: Sequence[str] | None = None
) -> Table:
    """A table for a terminal.

    Args:
        rows: of one dataclass.
        title: above it.
        columns: fields to show; all if left out.
    """
    names = columns or ([f.name for f in dataclasses.fields(rows[0])] if rows else [])
    cells = {name: [_cell(getattr(row, name), name) for row in rows] for name in names}
    right = {n for n in names if rows and type(getattr(rows[0], n)) is int}
    return _table(title, cells, right)


def overview(structure: Structure, width: int) -> list[RenderableType]:
    """What `raycompress analyze` prints: groups, what is frozen and why, the counter's table.

    Args:
        structure: of the model.
        width: of the terminal, in columns.
    """
    from rich.markup import escape

    groups = channel_dependencies(structure)
    shown: list[RenderableType] = []
    steps = {(s.group, s.step) for s in step_dependencies(structure)}
    cells = {
        "group": [g.group for g in groups],
        "pruned with": [_list([n for n in g.layers if n != g.group]) for g in groups],
        "read by": [_list(g.readers) for g in groups],
        "channels": [str(g.channels) for g in groups],
        "outputs": [
            _list([str(n) for name, n in sorted(steps) if name == g.group]) for g in groups
        ],
        "params": [_number(g.params) for g in groups],
        "not exact because of": [g.reason for g in groups],
    }
    if width < WIDE:
        del cells["read by"]
    if all(g.exact for g in groups):
        del cells["not exact because of"]
    right = {"channels", "outputs", "params"}
    title = f"{len(groups)} channel groups (outputs and params of one channel)"
    shown.append(_table(title, cells, right))
    frozen = frozen_dims(structure)
    cells = {
        "reason": [f.reason for f in frozen],
        "dims": [str(len(f.parameters)) for f in frozen],
        "of": [_list(f.parameters) for f in frozen],
    }
    if frozen:
        shown.append(_table("Frozen: parameter[dim] that can't be pruned", cells, {"dims"}))
    if structure.form == "graph":
        shown.append("Slim models take graph form: module form would keep more of these whole.\n")
    if structure.unknown_ops:
        names = (f"{op} in {module or '(model)'}" for op, module in structure.unknown_ops.items())
        shown.append(escape(f"Operators without a rule: {', '.join(names)}\n"))
    if structure.untouched:
        shown.append(escape(f"Never used by the example: {', '.join(structure.untouched)}\n"))
    shown.append(layer_view(layer_rows(structure), width))
    return shown


def layer_view(rows: Sequence[LayerRow], width: int) -> Table:
    """The counter's table; where the kept counts change a number, both are shown.

    Args:
        rows: from `layer_rows`.
        width: of the terminal, in columns; shapes and FLOPs are left out of narrow ones.
    """
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("params", "params", _number),
        ("MACs", "macs", _number),
        ("activations", "activation_bytes", _bytes),
    ]
    if width >= WIDE:
        columns.insert(0, ("output", "output", _shape))
        columns.insert(0, ("weight", "weight", _shape))
        columns.insert(4, ("FLOPs", "flops", _number))
    cells = {"layer": [r.layer for r in rows], "type": [r.type for r in rows]}
    for header, name, text in columns:
        cells[header] = []
        for row in rows:
            before, after = getattr(row, name), getattr(row, f"kept_{name}")
            one, other = text(before), text(after)
            cells[header].append(one if before == after else f"{one} > {other}")
    table = _table("Layers, for one example", cells, {c[0] for c in columns})
    if rows:
        table.rows[-1].style = "bold"
    return table


def _table(title: str, cells: dict[str, list[str]], right: set[str]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in cells:
        table.add_column(
            name.replace("_", " "),
            justify="right" if name in right else "left",
            overflow="fold",
            no_wrap=name in right,
        )
    for line in zip(*cells.values(), strict=True):
        table.add_row(*map(escape, line))
    return table


def _cell(value: object, name: str) -> str:
    if isinstance(value, tuple):
        return _list([str(v) for v in value])
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return _bytes(value) if name.endswith("bytes") else _number(value)
    return str(value)


def _list(names: Sequence[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:most])} and {rest} more"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _number(value: int) -> str:
    if value < 1e4:
        return str(value)
    rounded = float(f"{value:.3g}")
    size, unit = next(u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if rounded >= u[0])
    return f"{rounded / size:.3g} {unit}"


def _bytes(value: int) -> str:
    return f"{_number(value)}B" if value >= 1e4 else f"{value} B"
