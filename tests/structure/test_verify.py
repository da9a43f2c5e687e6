"""An explanation must have to do with what was pruned."""

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


def pruned(name):
    torch.manual_seed(0)
    model, x = Mixed().double().eval(), torch.randn(4, 5, dtype=torch.float64)
    structure = analyze(model, (x,))
    kept = {name: list(range(1, structure.group(name).num_channels, 2))}
    small = slim(model, structure, kept)
    return masked_copy(model, structure.masks(kept)), small, (x,), structure


def test_a_pruned_norm_explains_a_difference():
    masked, small, x, structure = pruned("a")
    verdict = verify(masked, small, x, structure=structure)
    assert verdict.kind == "inexact" and verdict.reasons


def test_a_norm_that_lost_nothing_excuses_nothing():
    masked, small, x, structure = pruned("b")
    assert verify(masked, small, x, structure=structure).kind == "exact"
    with torch.no_grad():
        small.c.weight.mul_(1.01)
    assert verify(masked, small, x, structure=structure).kind == "wrong"
