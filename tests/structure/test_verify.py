"""An explanation must have to do with what was pruned, and the surgery must be right."""

import copy

import pytest
import torch
from torch import nn

from raycompress.errors import StructureError
from raycompress.masks import masked_copy
from raycompress.structure import analyze, slim, verify


class Mixed(nn.Module):
    """One group crosses a LayerNorm, the other doesn't."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(self.norm(self.a(x)))))


class Pruned:
    """Every second channel of one group is gone."""

    def __init__(self, name, dtype=torch.float64):
        torch.manual_seed(0)
        model, self.x = Mixed().to(dtype).eval(), torch.randn(4, 5, dtype=dtype)
        with torch.no_grad():
            for p in model.norm.parameters():
                p.uniform_(0.5, 1.5)
        self.structure = analyze(model, self.x)
        group = self.structure.group(name)
        self.kept = {group.name: list(range(1, group.num_channels, 2))}
        self.small = slim(model, self.structure, self.kept)
        self.masked = masked_copy(model, self.structure.masks(self.kept))

    def verdict(self):
        return verify(self.masked, self.small, self.x, structure=self.structure, kept=self.kept)


def test_a_pruned_norm_explains_a_difference():
    verdict = Pruned("a").verdict()
    assert verdict.kind == "inexact" and verdict.reasons == ("LayerNorm 'norm'",)
    assert verdict.max_error > 1e-3 > 1e-12 > verdict.reference_error


def test_a_norm_that_lost_nothing_excuses_nothing():
    pruned = Pruned("b")
    assert pruned.verdict().kind == "exact" and pruned.verdict().reference_error is None
    with torch.no_grad():
        pruned.small.c.weight.mul_(1.01)
    assert pruned.verdict().kind == "wrong"


def test_a_difference_is_wrong_without_what_explains_it():
    pruned = Pruned("a")
    for given in ({}, {"structure": pruned.structure}):
        verdict = verify(pruned.masked, pruned.small, pruned.x, **given)
        assert verdict.kind == "wrong" and "`kept`" in verdict.reasons[0]


class Tiny(nn.Module):
    """A branch whose layer scale is 1e-6, as new ConvNeXts have it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.full((5,), 1e-6))

    def forward(self, x):
        return x + self.scale * self.b(self.norm(self.a(x)))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "exact"), (torch.float64, "wrong")])
def test_behind_a_tiny_gain_only_float64_finds_a_mistake(dtype, kind):
    """What the docstring of `verify` warns of."""
    torch.manual_seed(0)
    model, x = Tiny().eval(), torch.randn(4, 5)
    structure = analyze(model, x)
    kept = {"a": [1, 3, 6]}
    small, masked = slim(model, structure, kept), masked_copy(model, structure.masks(kept))
    with torch.no_grad():
        small.b.weight.copy_(small.b.weight.flip(1))
    verdict = verify(masked, small, x, structure=structure, kept=kept, dtype=dtype)
    assert verdict.kind == kind


class Answering(nn.Module):
    """Answers with whatever `answer` makes of a linear layer's output."""

    def __init__(self, answer):
        super().__init__()
        self.layer, self.answer = nn.Linear(2, 2), answer
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(2))
            self.layer.bias.zero_()

    def forward(self, x):
        return self.answer(self.layer(x))


class Answer:
    def __init__(self, value):
        self.value = value


def compared(left, right, x=((1.0, 2.0),)):
    return verify(Answering(left), Answering(right), torch.tensor(x))


def test_outputs_are_found_wherever_they_are():
    for wrap in (lambda y: y, lambda y: {"a": [y]}, lambda y: (None, Answer(y)), torch.complex):
        put = (lambda y: torch.complex(y, y)) if wrap is torch.complex else wrap
        assert compared(put, put).kind == "exact"
        verdict = compared(put, lambda y, put=put: put(y + torch.tensor([0.0, 0.5])))
        assert verdict.kind == "wrong" and verdict.max_error == 0.25


def test_nothing_to_compare_is_no_proof():
    for empty in (lambda y: None, lambda y: y[:0]):
        verdict = compared(empty, empty)
        assert verdict.kind == "wrong" and "no values" in verdict.reasons[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_hide_nothing(bad):
    assert compared(lambda y: y, lambda y: y.masked_fill(y == 2, bad)).max_error == float("inf")
    assert compared(lambda y: y.masked_fill(y == 2, bad), lambda y: y).kind == "wrong"
    spoilt = compared(*[lambda y: torch.full_like(y, float("nan"))] * 2)
    assert spoilt.kind == "wrong"


def test_a_model_that_does_not_run_is_named():
    def stop(_y):
        raise KeyError("head")

    assert compared(stop, lambda y: y).reasons == (
        "the masked model doesn't run: KeyError: 'head'",
    )
    assert compared(lambda y: y, stop).reasons == ("the slim model doesn't run: KeyError: 'head'",)
    assert "output shapes" in compared(lambda y: y, lambda y: y[:, :1]).reasons[0]


def test_a_model_that_writes_to_its_input_sees_the_same_input_twice():
    class Writes(nn.Module):
        def forward(self, x):
            return x.add_(1)

    x = torch.zeros(2)
    assert verify(Writes(), Writes(), x).kind == "exact" and x.tolist() == [0, 0]


def test_modes_are_put_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    assert verify(model, copy.deepcopy(model), torch.randn(4, 3)).kind == "exact"
    assert all(m.training for m in model.modules())


def test_kept_that_does_not_fit_is_an_error():
    pruned = Pruned("a")
    with pytest.raises(StructureError, match=r"channels 0\.\.7"):
        verify(
            pruned.masked, pruned.small, pruned.x, structure=pruned.structure, kept={"a": [1, 8]}
        )
