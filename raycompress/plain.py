"""Frozen dataclasses as plain data and back: an import path and the fields, for keys and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from raycompress.identity import source_digest
from raycompress.importing import resolve

__all__ = ["from_plain", "to_plain"]

SOURCE = "source digest"
"""Key of the digest of the code; with a blank, so that no field can have its name."""


def to_plain(value: object) -> dict[str, Any]:
    """`{"type": "package.module:Class", **fields}` of an instance of a dataclass.

    For a class of the user's own also `source_digest`, so that keys differ once it was edited.

    Raises:
        TypeError: It is no instance of a dataclass, or its class lives inside a function, from
            where another process couldn't import it.
    """
    cls = type(value)
    if not dataclasses.is_dataclass(value) or "<locals>" in cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} must be a dataclass at the top level of its module")
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    source = source_digest(cls)
    own = {SOURCE: source} if source else {}
    return {"type": f"{cls.__module__}:{cls.__qualname__}", **own, **fields}


def from_plain(data: Mapping[str, Any], base: type[Any]) -> Any:
    """The inverse of `to_plain`, also after a trip through JSON.

    Raises:
        ConfigError: The class can't be imported, or doesn't inherit from `base`.
    """
    cls = resolve(str(data["type"]), base)
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in data.items()
        if name not in ("type", SOURCE)
    }
    return cls(**fields)
