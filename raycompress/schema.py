"""What a job may say, in words and as JSON Schema: both come from types and docstrings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from typing import Any

import pydantic  # noqa: TID251 - the YAML edge

import raycompress.pruning
from raycompress.budget import RESOURCES
from raycompress.config import JobConfig
from raycompress.pruning import Pruner
from raycompress.quantization import QUANTIZERS
from raycompress.quantize_section import QuantizeSection
from raycompress.tuning.spaces import WORDS

__all__ = ["field_docs", "json_schema", "pruner_types"]


_ABOUT: tuple[str, ...] = ("title", "description", "default")
_ENDS = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
SPACE: dict[str, Any] = {
    "type": "object",
    "description": "Values that `tune` chooses from.",
    "properties": {
        "choice": {"type": "array", "minItems": 2},
        "int": {**_ENDS, "items": {"type": "integer"}},
        "uniform": _ENDS,
        "loguniform": _ENDS,
        "each": {"const": True, "description": "A value for each group that a pattern matches."},
    },
    "oneOf": [{"required": [word]} for word in WORDS],
    "additionalProperties": False,
}


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Descriptions of a class's fields, from the `Attributes:` of its and its bases' docstrings."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "")
        _, _, section = text.partition("Attributes:\n")
        name = ""
        for line in section.splitlines():
            entry = re.match(r"    (\w+): (.*)", line)
            if entry:
                name = entry[1]
                docs[name] = entry[2]
            elif line.startswith("        ") and name:
                docs[name] += f" {line.strip()}"
            else:
                break
    return docs


def pruner_types() -> dict[str, type[Pruner]]:
    """The pruners that a job can name without an import path."""
    exported = {name: getattr(raycompress.pruning, name) for name in raycompress.pruning.__all__}
    return {
        name: value
        for name, value in exported.items()
        if isinstance(value, type) and issubclass(value, Pruner) and value is not Pruner
    }


def json_schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors: keys, types, defaults and descriptions."""
    schema = pydantic.TypeAdapter(JobConfig).json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "raycompress job"
    definitions = schema.setdefault("$defs", {})
    _finish(schema, JobConfig)
    for hint in _dataclasses_in(JobConfig):
        _finish(definitions[hint.__name__], hint)
    definitions["Space"] = SPACE
    entries: list[dict[str, Any]] = []
    for name, cls in pruner_types().items():
        definitions[name] = _pruner(cls, name)
        entries.append({"$ref": f"#/$defs/{name}"})
    entries.append(
        {
            "type": "object",
            "title": "A pruner of your own",
            "properties": {
                "type": {"pattern": r"^[\w.]+:[\w.]+$", "description": "package.module:Class"}
            },
            "required": ["type"],
        }
    )
    entries.append(
        {
            "type": "object",
            "title": "A choice of pruners",
            "properties": {"type": {"$ref": "#/$defs/Space"}},
            "required": ["type"],
        }
    )
    schema["properties"]["pruners"]["items"] = {"anyOf": entries}
    schema["properties"]["quantize"] = _quantize(definitions)
    schema["properties"]["budgets"]["items"] = {
        "type": "object",
        "properties": {
            name: {
                "anyOf": [
                    {"type": "number", "exclusiveMinimum": 0},
                    {"type": "string", "pattern": r"^\s*[0-9.]+%?\s*$"},
                ]
            }
            for name in RESOURCES
        },
        "additionalProperties": False,
        "minProperties": 1,
    }
    return schema


def _quantize(definitions: dict[str, Any]) -> dict[str, Any]:
    """One mapping for each quantizer: its own keys beside those of the section."""
    section = pydantic.TypeAdapter(QuantizeSection).json_schema()
    inner = section.pop("$defs", {})
    for hint in _dataclasses_in(QuantizeSection):
        _finish(inner[hint.__name__], hint)
    definitions.update(inner)
    _finish(section, QuantizeSection)
    entries: list[dict[str, Any]] = []
    for name, cls in QUANTIZERS.items():
        own = pydantic.TypeAdapter(cls).json_schema()
        own["properties"] = {"type": {"const": name}, **own.get("properties", {})}
        own["required"] = ["type", *own.get("required", [])]
        _finish(own, cls)
        own["properties"] |= section["properties"]
        definitions[name] = own
        entries.append({"$ref": f"#/$defs/{name}"})
    entries.append(
        {
            "type": "object",
            "title": "A quantizer of your own",
            "properties": {
                "type": {"pattern": r"^[\w.]+:[\w.]+$", "description": "package.module:Class"},
                **section["properties"],
            },
            "required": ["type"],
        }
    )
    description = field_docs(JobConfig)["quantize"]
    return {"description": description, "default": None, "anyOf": [*entries, {"type": "null"}]}


def _pruner(cls: type, name: str) -> dict[str, Any]:
    schema = pydantic.TypeAdapter(cls).json_schema()
    schema["properties"] = {"type": {"const": name}, **schema.get("properties", {})}
    schema["required"] = ["type", *schema.get("required", [])]
    _finish(schema, cls)
    for key, value in schema["properties"].items():
        if key != "type":
            schema["properties"][key] = _or_space(value)
    return schema


def _or_space(value: dict[str, Any]) -> dict[str, Any]:
    """A field's schema, or a space in its place; below patterns of layers as well."""
    inner = dict(value)
    outer: dict[str, Any] = {name: inner.pop(name) for name in _ABOUT if name in inner}
    if isinstance(inner.get("additionalProperties"), dict):
        inner["additionalProperties"] = _or_space(inner["additionalProperties"])
    return {**outer, "anyOf": [inner, {"$ref": "#/$defs/Space"}]}


def _finish(schema: dict[str, Any], cls: type) -> None:
    """Adds what pydantic doesn't know of a plain dataclass."""
    schema["additionalProperties"] = False
    schema["description"] = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
    for name, text in field_docs(cls).items():
        if name in schema["properties"]:
            schema["properties"][name]["description"] = text


def _dataclasses_in(cls: type) -> list[type]:
    found = []
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                found.append(part)
    return found
