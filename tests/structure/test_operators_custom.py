"""Operators that nobody here knows: frozen, listed, and pruned once they have a rule."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pruned import prunable, prune
from torch import Tensor, nn

from raycompress.structure import Call, elementwise, register_operator
from raycompress.structure.rules import operators


@torch.library.custom_op("raycompress_operators::gate", mutates_args=())
def gate(x: Tensor, y: Tensor) -> Tensor:
    return x * y.sigmoid()


@torch.library.custom_op("raycompress_operators::halves", mutates_args=())
def halves(x: Tensor) -> list[Tensor]:
    return [part.clone() for part in x.chunk(2, 1)]


@torch.library.custom_op("raycompress_operators::double_", mutates_args={"x"})
def double_(x: Tensor) -> None:
    x.mul_(2)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(8, 12, 1)
        self.d = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = halves(gate(self.a(x), self.b(x)))
        y = self.c(first * second)
        double_(y)
        return self.d(y)


def images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 4, 4).double(),)


@pytest.fixture
def rules() -> Iterator[None]:
    """Rules that a test registers don't outlive it."""
    before = dict(operators._RULES)
    yield
    operators._RULES.clear()
    operators._RULES.update(before)


def split_in_two(call: Call) -> None:
    source = call.arg("x")
    half = source.shape[1] // 2
    for facet in call.facets(source):
        call.space.unite(facet[:, :half], facet[:, half:])
        for out in call.out:
            call.set(out, [facet[:, :half]])


@pytest.mark.usefixtures("rules")
def test_each_rule_frees_what_its_operator_touched() -> None:
    # Without a batch norm or a bias in the way, each unknown operator freezes its own inputs.
    structure = prune(Custom(), images, removed=0).structure
    assert structure.unknown_ops == {
        "raycompress_operators::gate": "",
        "raycompress_operators::double": "",
    }
    assert [prunable(structure, f"{n}.weight", 0) for n in "abc"] == [0, 0, 0]

    register_operator("raycompress_operators::double", elementwise)
    structure = prune(Custom(), images, removed=0.15).structure
    assert "raycompress_operators::double" not in structure.unknown_ops
    assert [prunable(structure, f"{n}.weight", 0) for n in "abc"] == [0, 0, 1]

    register_operator("raycompress_operators::gate", elementwise)
    structure = prune(Custom(), images, removed=0.15).structure
    assert structure.unknown_ops == {"raycompress_operators::halves": ""}

    register_operator("raycompress_operators::halves", split_in_two)
    structure = prune(Custom(), images, removed=0.45).structure
    assert structure.unknown_ops == {}
    assert [prunable(structure, f"{n}.weight", 0) for n in "abc"] == [1, 1, 1]
    assert structure.group("a").producers == ("a", "b") and structure.group("a").num_channels == 8
