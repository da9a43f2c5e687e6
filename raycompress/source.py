"""Plain data and where it came from: a YAML file with its lines, and `--set` overrides.

Scalars follow YAML 1.2's core schema, since 1.1 has traps for people who write settings: `1e-3` is
a number here, `no` and `on` are text, nothing turns into a date. Integers may have underscores.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # noqa: TID251 - the YAML edge

from raycompress.errors import ConfigError
from raycompress.storage import ObjectPath, place_of
from raycompress.wording import KeyPath, dotted, shown

__all__ = ["Source", "plain", "to_yaml"]

MAX_VALUES = 100_000
"""More values than this aren't a job; aliases can multiply a small file without end."""


class _Loader(yaml.SafeLoader):
    """Safe, with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"^(?:{_pattern})$"),
        ["" if c == "\0" else c for c in _first],
    )


class Source:
    """A mapping, with a place for each of its values.

    Attributes:
        name: Of the file, or what stands for it in messages.
        data: The mapping, of plain data.
    """

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.data = data
        self._lines: dict[KeyPath, int] = {}
        self._overrides: dict[KeyPath, str] = {}

    @staticmethod
    def read(path: str | os.PathLike[str] | ObjectPath) -> Source:
        """Reads a YAML file, also from an object store.

        Raises:
            ConfigError: It isn't there, isn't YAML, or isn't a mapping.
        """
        place = place_of(path)
        name = str(place)
        try:
            text = place.read_text(encoding="utf-8")
        except FileNotFoundError:
            hint = _near_file(place) if isinstance(place, Path) else ""
            raise ConfigError(f"{name}: no such file{hint}") from None
        except IsADirectoryError:
            raise ConfigError(f"{name} is a folder, not a job file") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{name} isn't a text file in UTF-8") from None
        except OSError as error:
            raise ConfigError(f"{name} can't be read: {error.strerror or error}") from None
        return Source.parse(text, name)

    @staticmethod
    def parse(text: str, name: str) -> Source:
        """Reads YAML text; `name` stands for the file in messages."""
        source = Source(name, {})
        data = _compose(text, name, source._lines)
        if data is None:
            raise ConfigError(f"{name} is empty; a job needs at least a name and a task")
        if not isinstance(data, dict):
            raise ConfigError(f"{name} must be a mapping of keys to values, got {shown(data)}")
        source.data = data
        return source

    def where(self, path: KeyPath) -> str:
        """The place of a value, or of the nearest value around it."""
        for length in range(len(path), 0, -1):
            part = path[:length]
            if part in self._overrides:
                return self._overrides[part]
            if part in self._lines:
                return f"{self.name}, line {self._lines[part]}"
        return self.name

    def line(self, path: KeyPath) -> int:
        """The line of a value, or of the nearest value around it; 0 if there is none."""
        lines = (self._lines.get(path[:length]) for length in range(len(path), 0, -1))
        return next((line for line in lines if line is not None), 0)

    def error(self, path: KeyPath, message: str) -> str:
        """A message that starts with the place."""
        return f"{self.where(path)}: {message}"

    def located(self, message: str) -> str:
        """The same for a message that starts with a key, such as `targets.op_names: ...`."""
        words = re.match(r"[\w.\[\]]*", message)
        path = _parts(words[0]) if words else ()
        return self.error(path if path[:1] and path[0] in self.data else (), message)

    def override(self, overrides: Sequence[str]) -> None:
        """Applies `key.path=value` texts; values are YAML.

        Raises:
            ConfigError: A text isn't of that form, or its key leads nowhere.
        """
        for text in overrides:
            key, equals, value_text = text.partition("=")
            path = _parts(key.strip())
            if not equals or "" in path:
                raise ConfigError(
                    f"--set {text}: must be KEY=VALUE, such as cluster.replicas=4 "
                    "or budgets.0.macs=30%"
                )
            try:
                value = _compose(value_text, f"--set {text}", {})
            except ConfigError as error:
                raise ConfigError(re.sub(r", line 1(?=[,:])", "", str(error))) from None
            self.put(path, value, f"--set {text}")

    def put(self, path: KeyPath, value: object, origin: str) -> None:
        """Sets a value; `origin` stands for its place in messages."""
        place: Any = self.data
        for depth, part in enumerate(path):
            here = dotted(path[:depth]) or "the job"
            if isinstance(place, list):
                if not isinstance(part, int) or part >= len(place):
                    have = f"0 to {len(place) - 1}" if place[1:] else "only 0" if place else "none"
                    raise ConfigError(
                        f"{origin}: {here} is a list and has no entry {shown(part)} (it has {have})"
                    )
            elif not isinstance(place, dict):
                raise ConfigError(
                    f"{origin}: {here} is {shown(place)}, which has no key {shown(part)}"
                )
            else:
                part = str(part)
            if depth == len(path) - 1:
                place[part] = value
                break
            if isinstance(place, dict) and place.get(part) is None:
                if isinstance(path[depth + 1], int):
                    raise ConfigError(
                        f"{origin}: the job has no {dotted(path[: depth + 1])}; give the whole list"
                    )
                place[part] = {}
                self._overrides[path[: depth + 1]] = origin
            place = place[part]
        for known in (self._lines, self._overrides):
            for stale in [p for p in known if p[: len(path)] == path]:
                del known[stale]
        self._overrides[path] = origin


def _compose(text: str, name: str, lines: dict[KeyPath, int]) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _Walk(loader, name, lines).value(node, ())
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_error(error, name)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _syntax_error(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = name if mark is None else f"{name}, line {mark.line + 1}, column {mark.column + 1}"
    problem = error.problem or "it can't be parsed"
    hint = ""
    if "\\t" in problem:
        hint = "; indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        hint = "; check the indentation, and quote text that has a colon in it"
    elif "%" in problem:
        hint = "; quote text that starts with %"
    elif error.context and error.context_mark is not None:
        hint = f" ({error.context} that starts in line {error.context_mark.line + 1})"
    return f"{place}: not valid YAML: {problem}{hint}"


def _parts(key: str) -> KeyPath:
    """The inverse of `dotted`; also takes `budgets.0.macs`."""
    parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    return tuple(int(part) if part.isdecimal() else part for part in parts)


class _Walk:
    """Makes plain data of YAML nodes, and notes their lines."""

    def __init__(self, loader: _Loader, name: str, lines: dict[KeyPath, int]) -> None:
        self.loader, self.name, self.lines = loader, name, lines
        self.num_values = 0
        self.around: list[yaml.Node] = []

    def fail(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self.name}, line {node.start_mark.line + 1}: {message}")

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise ConfigError(f"{self.name} has more than {MAX_VALUES} values, which is no job")
        if node in self.around:
            raise self.fail(node, f"{dotted(path)} contains itself through an alias")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode) and not node.tag.endswith((":map", ":seq")):
            raise self.fail(node, f"{dotted(path)} must be plain data, got {node.tag}")
        if isinstance(node, yaml.MappingNode):
            self.around.append(node)
            result: Any = self.mapping(node, path)
            self.around.pop()
        elif isinstance(node, yaml.SequenceNode):
            self.around.append(node)
            result = [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            self.around.pop()
        else:
            result = self.loader.construct_object(node)
            if not isinstance(result, str | int | float | bool | None):
                raise self.fail(node, f"{dotted(path)} must be plain data, got {node.tag}")
        return result

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            text = getattr(key, "value", None)
            if not isinstance(text, str) or not key.tag.endswith((":str", ":merge")):
                inside = f" of {dotted(path)}" if path else ""
                got = text if isinstance(text, str) else "a list or mapping"
                raise self.fail(key, f"keys{inside} must be text, got {got}")
            line = key.start_mark.line + 1
            if text in first:
                raise self.fail(
                    key, f"{dotted((*path, text))} is given twice, first in line {first[text]}"
                )
            first[text] = line
        self.loader.flatten_mapping(node)
        result = {}
        for key, item in node.value:
            inner = (*path, key.value)
            # The line of the key, not of a value that may be an alias or start below it.
            self.lines[inner] = key.start_mark.line + 1
            result[key.value] = self.value(item, inner)
        return result


def _near_file(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 3, 0.6)
    return f"; did you mean {' or '.join(str(path.with_name(n)) for n in close)}?" if close else ""


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy with lists for tuples, as a YAML file would have given it."""

    def copy(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: copy(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [copy(inner) for inner in item]
        return item

    return {key: copy(item) for key, item in value.items()}


def to_yaml(data: Mapping[str, Any]) -> str:
    """YAML text that `Source.parse` reads back, keys in their order."""

    class Dumper(yaml.SafeDumper):
        """With short lists in one line."""

    def as_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
        flat = all(not isinstance(item, list | dict) for item in items)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)

    Dumper.add_representer(list, as_list)
    return str(yaml.dump(plain(data), Dumper=Dumper, sort_keys=False, allow_unicode=True))
