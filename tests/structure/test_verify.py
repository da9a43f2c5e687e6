"""An explanation must have to do with what was pruned, and the surgery must be right."""

import torch
from torch import nn

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
