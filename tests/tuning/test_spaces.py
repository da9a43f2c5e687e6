"""Spaces as users write them."""

from __future__ import annotations

import math
import random
import re

import pytest

from raycompress.errors import ConfigError
from raycompress.structure import analyze
from raycompress.testing import ToyTask
from raycompress.tuning import Integers, Interval, OneOf, SearchSpace, is_space, read_space
from raycompress.tuning.entries import corners, find_spaces, has_spaces, spread

PATH = ("pruners", 0, "lr")


@pytest.mark.parametrize(
    ("written", "space"),
    [
        ({"choice": ["l1", "taylor"]}, OneOf(("l1", "taylor"))),
        ({"choice": [1, 1.0, True, None, [1, 2]]}, OneOf((1, 1.0, True, None, [1, 2]))),
        ({"int": [10, 40]}, Integers(10, 40)),
        ({"uniform": [0, 0.5]}, Interval(0.0, 0.5)),
        ({"uniform": [-1, 1], "each": True}, Interval(-1.0, 1.0)),
        ({"loguniform": [1e-3, 0.1]}, Interval(1e-3, 0.1, log=True)),
    ],
)
def test_spaces_are_read(written, space):
    assert is_space(written) and read_space(written, PATH) == space


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"choice": "l1"}, "pruners[0].lr.choice must be a list of at least two values, got 'l1'"),
        ({"choice": [1]}, "pruners[0].lr.choice must be a list of at least two values, got [1]"),
        ({"choice": ["a", "b", "a"]}, 'pruners[0].lr.choice has "a" twice'),
        ({"int": 3}, "pruners[0].lr.int must be [low, high], got 3"),
        ({"int": [1, 2, 3]}, "pruners[0].lr.int must be [low, high], got [1, 2, 3]"),
        ({"int": [1, 2.5]}, "pruners[0].lr.int must be two integers, got [1, 2.5]"),
        ({"int": [True, 2]}, "pruners[0].lr.int must be two integers, got [true, 2]"),
        ({"int": [4, 4]}, "pruners[0].lr.int must be [low, high] with low below high, got [4, 4]"),
        ({"uniform": ["a", 1]}, 'pruners[0].lr.uniform must be two numbers, got ["a", 1]'),
        (
            {"uniform": [0.9, 0.1]},
            "pruners[0].lr.uniform must be [low, high] with low below high, got [0.9, 0.1]",
        ),
        (
            {"uniform": [0, math.inf]},
            "pruners[0].lr.uniform must be [low, high] with low below high, got [0, Infinity]",
        ),
        ({"loguniform": [0, 1]}, "pruners[0].lr.loguniform must be above 0, got [0, 1]"),
        (
            {"uniform": [0, 1], "int": [0, 1]},
            "pruners[0].lr must be one space, got uniform and int",
        ),
        (
            {"uniform": [0, 1], "eahc": True},
            "pruners[0].lr: 'eahc' is no key of a space; a space is one of choice, int, uniform, "
            "loguniform",
        ),
        (
            {"uniform": [0, 1], "each": 3},
            "pruners[0].lr.each must be true, or be left out, got 3",
        ),
    ],
)
def test_bad_spaces_say_what_is_wrong(written, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        read_space(written, PATH)


def test_draws_stay_within_and_reach_everything():
    rng = random.Random(0)
    assert {Integers(1, 4).draw(rng) for _ in range(99)} == {1, 2, 3, 4}
    assert {OneOf(("a", "b")).draw(rng) for _ in range(99)} == {"a", "b"}
    linear = [Interval(1.0, 100.0).draw(rng) for _ in range(999)]
    log = [Interval(1.0, 100.0, log=True).draw(rng) for _ in range(999)]
    assert all(1 <= value <= 100 for value in linear + log)
    # Half of the numbers lie below 50.5, half of the logarithms below 10: 5 standard errors.
    assert abs(sum(value < 50.5 for value in linear) - 499.5) < 5 * 15.8
    assert abs(sum(value < 10 for value in log) - 499.5) < 5 * 15.8


ENTRY = {
    "type": {"choice": ["L1Filter", "FPGM"]},
    "round_to": {"int": [1, 4]},
    "nested": {"conv*": {"uniform": [0.1, 0.9]}, "fc": 0.5},
}


def test_spaces_of_an_entry_are_found_and_filled():
    assert has_spaces(ENTRY) and not has_spaces({"type": "L1Filter", "a": [{"b": 1}]})
    spaces = find_spaces(ENTRY)
    assert spaces == {
        ("type",): OneOf(("L1Filter", "FPGM")),
        ("round_to",): Integers(1, 4),
        ("nested", "conv*"): Interval(0.1, 0.9),
    }
    space = SearchSpace.of([ENTRY])
    point = {"type": "FPGM", "round_to": 2, "nested.conv*": 0.25}
    assert space.entry(point) == {
        "type": "FPGM",
        "round_to": 2,
        "nested": {"conv*": 0.25, "fc": 0.5},
    }
    assert space.settings(point) == point
    assert ENTRY["round_to"] == {"int": [1, 4]}


def test_corners_try_both_ends_of_each_space_under_each_type():
    tried = [
        (entry["type"], entry["round_to"], entry["nested"]["conv*"])
        for entry in corners(ENTRY, find_spaces(ENTRY))
    ]
    assert tried == [
        *(("L1Filter", 1, 0.1), ("L1Filter", 4, 0.1), ("L1Filter", 1, 0.9)),
        *(("FPGM", 1, 0.1), ("FPGM", 4, 0.1), ("FPGM", 1, 0.9)),
    ]


def test_several_entries_have_parameters_of_their_own():
    space = SearchSpace.of([{"type": "A", "x": {"int": [1, 2]}}, {"type": "B"}])
    assert space.parameters() == {"pruner": OneOf((0, 1)), "0.x": Integers(1, 2)}
    assert space.entry({"pruner": 1}) == {"type": "B"}
    assert space.settings({"pruner": 0, "0.x": 2}) == {"type": "A", "x": 2}
    assert list(space.points()) == [
        {"pruner": 0, "0.x": 1},
        {"pruner": 0, "0.x": 2},
        {"pruner": 1},
    ]
    drawn = [space.draw(random.Random(i)) for i in range(30)]
    assert {"pruner": 1} in drawn and {"pruner": 0, "0.x": 2} in drawn


def test_a_grid_needs_ends():
    with pytest.raises(ConfigError, match=r"pruners\[0\]\.lr: a grid takes spaces of choice and"):
        list(SearchSpace.of([{"type": "A", "lr": {"uniform": [0, 1]}}]).points())


def groups():
    task = ToyTask()
    return analyze(task.build_model(), task.example_inputs(), form="module").groups


def test_each_gives_every_group_its_own():
    own = {"uniform": [0.1, 0.9]}
    entry = {"type": "F", "sparsities": {"conv3": 0.5, "*": {**own, "each": True}}}
    assert spread(entry, groups()) == {"type": "F", "sparsities": {"conv3": 0.5, "conv1": own}}
    shared = {"type": "F", "sparsities": {"*": own}}
    assert spread(shared, groups()) == shared


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"lr": {"uniform": [0, 1], "each": True}},
            r"pruners\[0\]\.lr\.each goes with patterns of layers",
        ),
        (
            {"sparsities": {"covn*": {"uniform": [0, 1], "each": True}}},
            r"pruners\[0\]\.sparsities: 'covn\*' matches no layer that can be pruned",
        ),
    ],
)
def test_each_needs_layers(entry, message):
    with pytest.raises(ConfigError, match=message):
        spread(entry, groups(), ("pruners", 0))
