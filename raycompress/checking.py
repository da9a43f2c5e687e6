"""A walk over dataclasses that collects every mistake in plain data, with its key.

Single values are judged by pydantic, strictly: "3" is no integer, 3 is a fine number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from raycompress.budget import Budget
from raycompress.errors import ConfigError, InputError
from raycompress.importing import named
from raycompress.pruning import Pruner
from raycompress.quantization import QUANTIZERS, Quantizer
from raycompress.quantize_section import QuantizeSection
from raycompress.schema import field_docs, pruner_types
from raycompress.tuning.entries import corners, has_spaces, places
from raycompress.tuning.spaces import read_space
from raycompress.wording import KeyPath, describe, dotted, near, shown

__all__ = ["Check"]


class Check:
    """Builds dataclasses from plain data, and collects what is wrong with it.

    Attributes:
        problems: (key path, message that starts with the key), in the order found.
    """

    def __init__(self) -> None:
        self.problems: list[tuple[KeyPath, str]] = []

    def fail(self, path: KeyPath, message: str) -> None:
        """Notes a mistake."""
        self.problems.append((path, message))

    def build(self, cls: type, data: object, path: KeyPath) -> object:
        """An instance, or None after a problem."""
        key = dotted(path)
        if not isinstance(data, dict):
            self.fail(path, f"{key} must be a mapping of keys to values, got {shown(data)}")
            return None
        before = len(self.problems)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for name in data:
            if name not in fields:
                allowed = f"; it has {', '.join(fields)}" if fields else "; it has none"
                whose = cls.__name__ if issubclass(cls, Pruner | Quantizer) else key or "a job"
                self.fail(
                    (*path, name),
                    f"{dotted((*path, name))} is no key of {whose}{near(name, fields, allowed)}",
                )
        values = {}
        for name, field in fields.items():
            inner = (*path, name)
            if name in data:
                values[name] = self.value(hints[name], data[name], inner)
            elif field.default is field.default_factory is dataclasses.MISSING:
                doc = field_docs(cls).get(name, describe(hints[name]))
                self.fail(path, f"{dotted(inner)} is missing: {doc.rstrip('.')}")
        if len(self.problems) > before:
            return None
        try:
            result: object = cls(**values)
        except (InputError, ValueError) as error:
            self.fail(*_relocate(str(error), cls, path, fields))
            return None
        return result

    def value(self, hint: Any, value: object, path: KeyPath) -> object:
        """A field's value, checked; None after a problem."""
        arguments = typing.get_args(hint)
        origin = typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType) and type(None) in arguments:
            if value is None:
                return None
            rest = [argument for argument in arguments if argument is not type(None)]
            if len(rest) == 1:
                return self.value(rest[0], value, path)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.build(hint, value, path)
        if origin is tuple and arguments[1:] == (...,):
            if not isinstance(value, list):
                hint_text = f"; write [{value}]" if isinstance(value, str | int | float) else ""
                self.fail(path, f"{dotted(path)} must be a list, got {shown(value)}{hint_text}")
                return None
            return tuple(
                self.value(arguments[0], item, (*path, index)) for index, item in enumerate(value)
            )
        return self.leaf(hint, value, path)

    def leaf(self, hint: Any, value: object, path: KeyPath) -> object:
        """A value that pydantic judges."""
        reason = ""
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            reason = "plain data with finite numbers"
        else:
            try:
                # JSON, since strict JSON input turns a list into a tuple and 3 into 3.0.
                return _adapter(hint).validate_json(text, strict=True)
            except pydantic.ValidationError as error:
                reason = describe(hint) or error.errors()[0]["msg"]
        known = [a for a in typing.get_args(hint) if isinstance(a, str)]
        self.fail(path, f"{dotted(path)} must be {reason}, got {shown(value)}{near(value, known)}")
        return None

    def pruner(self, entry: object, path: KeyPath) -> Pruner | None:
        """A pruner, or None after a problem."""
        if not isinstance(entry, dict):
            self.fail(path, f"{dotted(path)} must be a mapping with a type, got {shown(entry)}")
            return None
        cls = self.kind(entry.get("type"), Pruner, pruner_types(), path)
        built = cls and self.build(cls, {k: v for k, v in entry.items() if k != "type"}, path)
        return built if isinstance(built, Pruner) else None

    def quantizer(
        self, entry: dict[str, Any], path: KeyPath
    ) -> tuple[Quantizer, QuantizeSection] | None:
        """A quantizer and the rest of its section, or None after a problem."""
        cls = self.kind(entry.get("type"), Quantizer, QUANTIZERS, path)
        common = {field.name for field in dataclasses.fields(QuantizeSection)}
        section = self.build(QuantizeSection, {k: v for k, v in entry.items() if k in common}, path)
        own = {k: v for k, v in entry.items() if k not in {"type", *common}}
        built = cls and self.build(cls, own, path)
        if isinstance(built, Quantizer) and isinstance(section, QuantizeSection):
            return built, section
        return None

    def kind(
        self, name: object, base: type[Any], known: Mapping[str, type[Any]], path: KeyPath
    ) -> type[Any] | None:
        """The class that `type` names, or None after a problem."""
        key = dotted(path)
        if not isinstance(name, str):
            got = "" if name is None else f", got {shown(name)}"
            self.fail(
                (*path, "type"),
                f"{key}.type must be one of {', '.join(known)}, or an import path "
                f"'package.module:Class'{got}",
            )
            return None
        try:
            cls = named(name, base, known, f"{key}.type")
        except ConfigError as error:
            self.fail((*path, "type"), str(error))
            return None
        if not dataclasses.is_dataclass(cls):
            self.fail((*path, "type"), f"{key}.type: {name!r} must be a dataclass")
            return None
        return cls

    def pruner_or_space(self, entry: dict[str, Any], path: KeyPath) -> None:
        """Checks a pruner; of one with spaces, their corners."""
        if not has_spaces(entry):
            self.pruner(entry, path)
            return
        before = len(self.problems)
        spaces = {}
        for at, value in places(entry):
            try:
                spaces[at] = read_space(value, (*path, *at))
            except ConfigError as error:
                self.fail((*path, *at), str(error))
        if len(self.problems) == before:
            for corner in corners(entry, spaces):
                self.pruner(corner, path)
            self.problems = list(dict.fromkeys(self.problems))

    def budget(self, values: Mapping[str, Any], path: KeyPath) -> None:
        """Checks a budget, each resource by itself."""
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                self.fail(
                    (*path, name),
                    f"{dotted((*path, name))} must be a percentage kept such as 50%, or a number "
                    f"above 0, got {shown(value)}",
                )
                continue
            try:
                Budget.of({name: value}, dotted(path))
            except InputError as error:
                self.fail((*path, name), str(error))
        if not values:
            self.fail(path, f"{dotted(path)} must name a resource, such as {{macs: 50%}}")


def _relocate(
    message: str, cls: type, path: KeyPath, fields: Mapping[str, object]
) -> tuple[KeyPath, str]:
    """Puts the job's key in place of the class or field that a constructor's message names."""
    message = message.removeprefix(f"{cls.__name__}: ")
    match = re.match(r"(?:\w+\.)*(\w+)\b", message)
    if match and match[1] in fields:
        inner = (*path, match[1])
        return inner, dotted(inner) + message[match.end() :]
    return path, f"{dotted(path)}: {message}" if path else message


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(hint)
