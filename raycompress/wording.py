"""How messages name keys, values and types."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

__all__ = ["KeyPath", "describe", "dotted", "near", "shown"]

KeyPath = tuple[str | int, ...]
"""Of a value in nested mappings and lists, such as ("pruners", 0, "sparsity")."""

WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def dotted(path: KeyPath) -> str:
    """A key path as people write it: `pruners[0].sparsity`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def near(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """A hint with known names that are close to a wrong one, else `otherwise`."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(str(name), names, 3, 0.6)
    if not close:  # "L1" and "l1" have nothing in common but the digit
        close = [each for each in names if each.lower() == str(name).lower()]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def shown(value: object, longest: int = 60) -> str:
    """A value for a message: in YAML's words, and short."""
    if isinstance(value, str):
        text = repr(value)
    else:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def describe(hint: Any) -> str:
    """What a value of a type must be, in words; "" for a type that has none."""
    if hint in WORDS:
        return WORDS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if hint is dict or origin is dict:
        return "a mapping of keys to values"
    if hint is list or hint is tuple or origin in (list, tuple):
        return "a list"
    if origin in (typing.Union, types.UnionType):
        words = ["null" if a is type(None) else describe(a) for a in arguments]
        return " or ".join(words) if all(words) else ""
    return ""
