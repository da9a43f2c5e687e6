"""Spaces: what stands in a job in place of a value that is to be found.

    {choice: [l1, taylor]}        one of these values
    {int: [10, 40]}               an integer, both ends included
    {uniform: [0.1, 0.9]}         a number between the two
    {loguniform: [1e-3, 1e-1]}    a number between the two, uniform in its logarithm

Below a pattern of layers, `each: true` gives each channel group that the pattern matches a value
of its own: `sparsities: {"block*": {uniform: [0.1, 0.9], each: true}}`.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import Any

from raycompress.errors import ConfigError
from raycompress.wording import KeyPath, dotted, near, shown

__all__ = ["WORDS", "Integers", "Interval", "OneOf", "Space", "is_space", "read_space"]

WORDS = ("choice", "int", "uniform", "loguniform")


@dataclass(frozen=True)
class OneOf:
    """One of several values.

    Attributes:
        options: Plain data, at least two, all different.
    """

    options: tuple[Any, ...]

    def corners(self) -> tuple[Any, ...]:
        """All of them."""
        return self.options

    def points(self) -> tuple[Any, ...] | None:
        """All of them."""
        return self.options

    def draw(self, rng: random.Random) -> Any:
        """Each as likely as the others."""
        return rng.choice(self.options)

    def index(self, value: Any) -> int:
        """Of a value; 1, 1.0 and true differ."""
        return [json.dumps(option) for option in self.options].index(json.dumps(value))


@dataclass(frozen=True)
class Integers:
    """The integers from `low` to `high`, both included."""

    low: int
    high: int

    def corners(self) -> tuple[Any, ...]:
        """Both ends."""
        return (self.low, self.high)

    def points(self) -> tuple[Any, ...] | None:
        """All of them."""
        return tuple(range(self.low, self.high + 1))

    def draw(self, rng: random.Random) -> Any:
        """Each as likely as the others."""
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`.

    Attributes:
        low: Lower end.
        high: Upper end.
        log: The logarithm is uniform, not the number.
    """

    low: float
    high: float
    log: bool = False

    def corners(self) -> tuple[Any, ...]:
        """Both ends."""
        return (self.low, self.high)

    def points(self) -> tuple[Any, ...] | None:
        """None: there is no end of them."""
        return None

    def draw(self, rng: random.Random) -> Any:
        """Uniform, in the number or in its logarithm."""
        if not self.log:
            return rng.uniform(self.low, self.high)
        drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return min(max(drawn, self.low), self.high)


Space = OneOf | Integers | Interval


def is_space(value: object) -> bool:
    """Whether a value of a job is meant as a space."""
    return isinstance(value, dict) and any(word in value for word in WORDS)


def read_space(value: dict[str, Any], path: KeyPath) -> Space:
    """Reads a space as users write it.

    Args:
        value: A mapping with one of `WORDS`, and perhaps `each`.
        path: Where it stands, for messages.

    Raises:
        ConfigError: With the key, what is wrong, and what is allowed.
    """
    key = dotted(path)
    unknown = [name for name in value if name not in (*WORDS, "each")]
    if unknown:
        allowed = f"; a space is one of {', '.join(WORDS)}"
        raise ConfigError(
            f"{key}: {unknown[0]!r} is no key of a space{near(unknown[0], WORDS, allowed)}"
        )
    words = [name for name in value if name in WORDS]
    if len(words) > 1:
        raise ConfigError(f"{key} must be one space, got {' and '.join(words)}")
    if value.get("each", True) is not True:
        raise ConfigError(f"{key}.each must be true, or be left out, got {shown(value['each'])}")
    word, content = words[0], value[words[0]]
    where = f"{key}.{word}"
    if word == "choice":
        return _one_of(content, where)
    if not isinstance(content, list) or len(content) != 2:
        raise ConfigError(f"{where} must be [low, high], got {shown(content)}")
    kind, name = ((int,), "integers") if word == "int" else ((int, float), "numbers")
    if not all(isinstance(end, kind) and not isinstance(end, bool) for end in content):
        raise ConfigError(f"{where} must be two {name}, got {shown(content)}")
    low, high = content
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{where} must be [low, high] with low below high, got {shown(content)}")
    if word == "int":
        return Integers(low, high)
    if word == "loguniform" and low <= 0:
        raise ConfigError(f"{where} must be above 0, got {shown(content)}")
    return Interval(float(low), float(high), log=word == "loguniform")


def _one_of(content: object, where: str) -> OneOf:
    if not isinstance(content, list) or len(content) < 2:
        raise ConfigError(f"{where} must be a list of at least two values, got {shown(content)}")
    written = [json.dumps(option) for option in content]
    twice = next((each for each in written if written.count(each) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where} has {twice} twice")
    return OneOf(tuple(content))
