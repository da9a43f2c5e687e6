"""How reports write numbers, and rows of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_row", "number"]


def number(value: float) -> str:
    """Three digits, with k, M or G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def markdown_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
