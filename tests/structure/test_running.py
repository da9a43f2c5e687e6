"""Models that run are analysed without an error, whatever their code does besides."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from raycompress.errors import StructureError
from raycompress.structure import analyze, slim, verify
from raycompress.structure.repair import Repair

INPUTS = (torch.rand(3, 5, 6),)


class Two(nn.Module):
    """Two layers; the models below do something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def between(self, x: Tensor) -> Tensor:
        return x.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Replaces(Two):
    """A buffer gets its shape from the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.zeros(1, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        if self.places.shape[1] != x.shape[1]:
            self.places = torch.arange(1.0, x.shape[1] + 1).reshape(1, -1, 1)
        return x.relu() * self.places


class Makes(Two):
    """A buffer with the channels is made by the first pass, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)

    def between(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.linspace(1, 2, 8)
        return x.relu() * self.scale


class Noise(Two):
    """Random numbers in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Grows(Two):
    """Each pass makes a buffer longer, along a dim that could have been pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(1, 8))

    def between(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.mean((0, 1))[None]])
        return x.relu() + self.seen[:1]


class Remembers(Two):
    """Activations that are kept can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def between(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x.relu()


@pytest.mark.parametrize("make", [Replaces, Makes, Noise])
def test_channels_are_pruned_beside(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    structure = analyze(model, INPUTS)
    kept = {"a": [1, 4, 6]}
    small = slim(model, structure, kept)
    assert small.get_submodule("a").weight.shape == (3, 6)
    masked = slim(model, structure, {})
    for name, mask in structure.masks(kept).items():
        masked.get_parameter(name).data.mul_(mask)
    assert verify(masked, small, (torch.rand(2, 7 if make is Replaces else 5, 6),)).kind == "exact"


def test_a_buffer_that_every_pass_replaces_stays_whole() -> None:
    structure = analyze(Grows(), INPUTS)
    assert structure.groups == ()


def test_a_model_that_cannot_be_copied_is_left_whole() -> None:
    model = Remembers()
    model(*INPUTS)
    structure = analyze(model, INPUTS, form="module")
    assert structure.groups == ()
    assert "a copy of the model doesn't run" in {
        f.reason.partition(":")[0] for f in structure.frozen
    }


@pytest.mark.parametrize("step", ["_try", "_accept", "_right"])
def test_a_repair_that_fails_keeps_channels_whole(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Views(Two):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8

        def between(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 5, self.width).relu()

    def fail(*_: Any) -> Any:
        raise IndexError("a mistake")

    assert [g.name for g in analyze(Views(), INPUTS, form="module").groups] == ["a"]
    monkeypatch.setattr(Repair, step, fail)
    with caplog.at_level(logging.WARNING):
        structure = analyze(Views(), INPUTS, form="module")
    assert structure.groups == () and "a mistake" in caplog.text
    reasons = {f.parameter: f.reason for f in structure.frozen if f.dim == 0}
    assert reasons["a.weight"].startswith("the code of the model can't be repaired (IndexError: ")


def test_caches_of_one_analysis_are_nothing_to_the_next() -> None:
    class Caches(Two):
        cached: Tensor | None = None

        def between(self, x: Tensor) -> Tensor:
            if self.cached is None:
                self.cached = self.a.bias.detach() * 2
            return x.relu()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(self.between(y)) + self.cached[:4]

    model = Caches()
    first = analyze(model, INPUTS, form="module")
    assert first.groups == ()  # four biases reach the output
    model.forward = lambda x: Two.forward(model, x) + model.cached[:4]  # type: ignore[method-assign]
    assert analyze(model, INPUTS, form="module").groups[0].name == "a"


def test_what_no_pass_can_show_is_refused() -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(StructureError, match=r"'0\.weight' has no shape yet: run the model once"):
        analyze(lazy, INPUTS)
    scripted = torch.jit.trace(nn.Linear(6, 2), INPUTS)
    with pytest.raises(StructureError, match="'the model' is TorchScript"):
        analyze(scripted, INPUTS)


def test_weight_norm_names_what_to_do() -> None:
    model = Two()
    parametrizations.weight_norm(model.a)
    structure = analyze(model, INPUTS)
    assert not structure.groups and not structure.unknown_ops
    assert any("remove the parametrization first" in f.reason for f in structure.frozen)
    torch.nn.utils.parametrize.remove_parametrizations(model.a, "weight")
    assert [g.name for g in analyze(model, INPUTS).groups] == ["a"]
