"""Nested frozen dataclasses as JSON data and back, by their annotations."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["from_data", "to_data"]

T = TypeVar("T")


def to_data(value: Any) -> Any:
    """What `json.dumps` takes; numbers that JSON lacks become "inf", "-inf" or "nan"."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_data(item) for item in value]
    if isinstance(value, dict):
        return {name: to_data(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_data(kind: type[T], value: Any) -> T:
    """The inverse of `to_data`.

    Raises:
        ValueError: Keys are unknown or missing.
    """
    result = _typed(kind, value)
    assert isinstance(result, kind)
    return result


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _typed(kind: Any, value: Any) -> Any:
    """JSON data as the annotated type: dataclasses, tuples, optional values, scalars."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"expected an object for {kind}, got {value!r}")
        hints = _hints(typing.cast(type, kind))
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"unknown keys in the summary: {', '.join(sorted(unknown))}")
        try:
            return typing.cast(type, kind)(**{k: _typed(hints[k], v) for k, v in value.items()})
        except TypeError as error:
            raise ValueError(f"incomplete summary: {error}") from error
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_typed(arguments[0], item) for item in value)
        return tuple(_typed(item_kind, v) for item_kind, v in zip(arguments, value, strict=True))
    if origin is dict:
        return {name: _typed(arguments[1], item) for name, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value)
    if kind is float:
        return float(value)
    return value
