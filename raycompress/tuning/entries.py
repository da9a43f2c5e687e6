"""The space that a job's pruners span: entries with spaces in place of values."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycompress.errors import ConfigError
from raycompress.pruning.fixed_allocation import matching
from raycompress.structure import ChannelGroup
from raycompress.tuning.spaces import OneOf, Space, is_space, read_space
from raycompress.wording import KeyPath, dotted

__all__ = ["Point", "SearchSpace", "corners", "find_spaces", "has_spaces", "places", "spread"]

Point = dict[str, Any]
"""A value for each parameter that counts, by its name."""

PRUNER = "pruner"
"""The parameter that says which entry is taken, where there are several."""


def has_spaces(entry: object) -> bool:
    """Whether there is a space anywhere in an entry."""
    if isinstance(entry, dict):
        return is_space(entry) or any(has_spaces(value) for value in entry.values())
    return isinstance(entry, list) and any(has_spaces(value) for value in entry)


def find_spaces(entry: Mapping[str, Any], path: KeyPath = ()) -> dict[KeyPath, Space]:
    """The spaces in an entry, by key path from it.

    Args:
        entry: A pruner as the job gives it.
        path: Of the entry in the job, for messages.

    Raises:
        ConfigError: One of them can't be read.
    """
    return {at: read_space(value, (*path, *at)) for at, value in places(entry)}


def places(value: object, at: KeyPath = ()) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """What is meant as a space in an entry, with its key path from it."""
    if isinstance(value, dict) and is_space(value):
        yield at, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*at, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*at, index))


def filled(entry: Mapping[str, Any], values: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """A copy of an entry with values in place of its spaces."""
    result = copy.deepcopy(dict(entry))
    for path, value in values.items():
        place: Any = result
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = copy.deepcopy(value)
    return result


def corners(entry: Mapping[str, Any], spaces: Mapping[KeyPath, Space]) -> Iterator[dict[str, Any]]:
    """Entries at the ends of every space (all options of a choice), one after the other.

    The others stand at their first corner meanwhile; under each option of `type` all are tried.
    """
    base = {path: space.corners()[0] for path, space in spaces.items()}
    kind = spaces.get(("type",))
    for name in kind.corners() if kind is not None else (None,):
        start = base if name is None else {**base, ("type",): name}
        yield filled(entry, start)
        for path, space in spaces.items():
            if path != ("type",):
                for value in space.corners()[1:]:
                    yield filled(entry, {**start, path: value})


def spread(
    entry: Mapping[str, Any], groups: Sequence[ChannelGroup], path: KeyPath = ()
) -> dict[str, Any]:
    """An entry in which each pattern with `each` has become the groups that it matches.

    Args:
        entry: A pruner as the job gives it.
        groups: That may be pruned, in the model's order.
        path: Of the entry in the job, for messages.

    Raises:
        ConfigError: A pattern that matches no layer, or `each` where there is no pattern.
    """
    result: dict[str, Any] = {}
    for name, value in entry.items():
        inner = (*path, name)
        if is_space(value) and "each" in value:
            raise ConfigError(
                f"{dotted(inner)}.each goes with patterns of layers, such as "
                "sparsities: {'block*': {uniform: [0.1, 0.9], each: true}}"
            )
        if not isinstance(value, dict) or is_space(value):
            result[name] = value
        elif any(is_space(each) and "each" in each for each in value.values()):
            result[name] = _by_group(value, groups, dotted(inner))
        else:
            result[name] = spread(value, groups, inner)
    return result


def _by_group(
    patterns: Mapping[str, Any], groups: Sequence[ChannelGroup], key: str
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern, names in matching(patterns, groups, key):
        value = patterns[pattern]
        if is_space(value) and "each" in value:
            own = {word: content for word, content in value.items() if word != "each"}
            found |= {name: own for name in names}
        else:
            found[pattern] = value
    return found


@dataclass(frozen=True)
class SearchSpace:
    """What is searched: which of the entries, and a value for each space in it.

    Attributes:
        entries: Pruners as the job gives them.
        spaces: Of each entry, by key path from it.
    """

    entries: tuple[Mapping[str, Any], ...]
    spaces: tuple[Mapping[KeyPath, Space], ...]

    @staticmethod
    def of(entries: Sequence[Mapping[str, Any]]) -> SearchSpace:
        """Reads entries.

        Raises:
            ConfigError: A space can't be read.
        """
        found = [find_spaces(entry, ("pruners", i)) for i, entry in enumerate(entries)]
        return SearchSpace(tuple(entries), tuple(found))

    def parameters(self) -> dict[str, Space]:
        """Every parameter by name; those of entries that aren't taken don't count."""
        found: dict[str, Space] = {}
        if len(self.entries) > 1:
            found[PRUNER] = OneOf(tuple(range(len(self.entries))))
        for index in range(len(self.entries)):
            found |= self.below(index)
        return found

    def below(self, index: int) -> dict[str, Space]:
        """The parameters of one entry, by name."""
        return {self._name(index, path): space for path, space in self.spaces[index].items()}

    def entry(self, point: Point) -> dict[str, Any]:
        """The pruner at a point."""
        index = point.get(PRUNER, 0)
        values = {path: point[self._name(index, path)] for path in self.spaces[index]}
        return filled(self.entries[index], values)

    def settings(self, point: Point) -> dict[str, Any]:
        """What was chosen, by the entry's own keys; to show."""
        index = point.get(PRUNER, 0)
        own = {dotted(path): point[self._name(index, path)] for path in self.spaces[index]}
        return {"type": self.entry(point)["type"], **own}

    def draw(self, rng: random.Random) -> Point:
        """A point at random; all entries are as likely."""
        point: Point = {}
        if len(self.entries) > 1:
            point[PRUNER] = rng.randrange(len(self.entries))
        for name, space in self.below(point.get(PRUNER, 0)).items():
            point[name] = space.draw(rng)
        return point

    def points(self) -> Iterator[Point]:
        """All points, the last parameter fastest.

        Raises:
            ConfigError: A space has no end of points.
        """
        options: list[list[list[tuple[str, Any]]]] = []
        for index, spaces in enumerate(self.spaces):
            options.append([] if len(self.entries) == 1 else [[(PRUNER, index)]])
            for path, space in spaces.items():
                each = space.points()
                if each is None:
                    raise ConfigError(
                        f"{dotted(('pruners', index, *path))}: a grid takes spaces of choice and "
                        "int alone"
                    )
                options[-1].append([(self._name(index, path), value) for value in each])
        for own in options:
            yield from (dict(chosen) for chosen in itertools.product(*own))

    def _name(self, index: int, path: KeyPath) -> str:
        return dotted(path) if len(self.entries) == 1 else f"{index}.{dotted(path)}"
