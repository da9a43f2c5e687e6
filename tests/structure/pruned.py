"""Prunes half of every group of a small module, and checks all that must hold of the result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raycompress.structure import Structure, analyze, expand, slim, verify
from raycompress.structure.quiet import quiet

Kept = dict[str, Tensor]


@dataclass
class Pruned:
    """A pruned module, checked."""

    structure: Structure
    kept: Kept
    dense: nn.Module
    masked: nn.Module
    slim: nn.Module
    removed: float  # share of parameters


def randomised(model: nn.Module) -> nn.Module:
    """Gains and variances away from zero, so that no wrong surgery can hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator) + 0.5
                tensor.copy_(values if "running_var" in name else values - 1)
    return model.double().eval()


def half(structure: Structure) -> Kept:
    """Random, non-leading channels: half of each group, rounded up, as its multiple allows."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for g in structure.groups:
        count = (g.num_channels + 1) // 2
        count = min(max(count + -count % g.multiple, g.min_kept), g.num_channels)
        kept[g.name] = torch.randperm(g.num_channels, generator=generator)[:count]
    return kept


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """The dense model with zeros in place of what goes."""
    result = copy.deepcopy(model)
    for name, mask in masks.items():
        result.get_parameter(name).data.mul_(mask)
    return result


def prunable(structure: Structure, parameter: str, dim: int) -> float:
    """Share of the indices along a dim of a parameter that belong to a group."""
    size = structure.leaves[parameter].shape[dim]
    members = [m for g in structure.groups for m in g.members]
    return sum(m.indices.size for m in members if (m.parameter, m.dim) == (parameter, dim)) / size


def counted(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Floating-point operations of one pass, as torch counts them."""
    # Fused kernels aren't in the counter's table.
    with quiet(model), FlopCounterMode(display=False) as flops:
        model(*inputs)
    return flops.get_total_flops()


def prune(
    model: nn.Module,
    inputs: Callable[[int], tuple[Any, ...]],
    *,
    removed: float,
    heads: Literal["whole", "dim"] = "whole",
    macs: bool = True,
    explained: bool = False,
) -> Pruned:
    """Prunes and checks: slim == masked, cost == counting, expand, and enough is removed.

    Args:
        model: the module.
        inputs: makes the arguments for a batch size.
        removed: least share of parameters that must go, so that freezing can't hide a failure.
        heads: as for `analyze`.
        macs: compare MACs with torch's counter (off where it counts other operators).
        explained: operations across channels may be reported, though nothing differs.
    """
    torch.manual_seed(0)
    model = randomised(model)
    structure = analyze(model, inputs(7), heads=heads, form="module")
    assert explained or all(g.exact for g in structure.groups)
    kept = half(structure)
    zeroed = masked(model, structure.masks(kept))
    small = slim(model, structure, kept)
    for batch in (7, 5):
        verdict = verify(zeroed, small, inputs(batch), structure=structure, kept=kept)
        assert verdict.kind == "exact" and verdict.max_error < 1e-10, (batch, verdict)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    share = 1 - after / before
    assert share >= removed, (share, structure.frozen)
    for candidate, counts in ((model, None), (small, {k: len(v) for k, v in kept.items()})):
        cost = structure.cost(counts)
        assert cost.params == sum(p.numel() for p in candidate.parameters())
        if macs:
            assert cost.macs == counted(candidate, inputs(7)) // 2 // structure.sizes.batch
    dense = copy.deepcopy(model)
    dense.load_state_dict(expand(structure, model, small.state_dict(), kept))
    back = verify(dense, small, inputs(3), structure=structure)
    assert back.max_error < 1e-10, back
    return Pruned(structure, kept, model, zeroed, small, share)
