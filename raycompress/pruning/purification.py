"""Purification: channels that are as good as dead after pruning go, too (arXiv 1907.03141).

C: channels of a group, P: what each owns in a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from raycompress.budget import Allocator
from raycompress.criteria import channel_rows
from raycompress.structure import ChannelGroup
from raycompress.structure.model import Role

__all__ = ["purified", "strengths"]


def strengths(model: nn.Module, group: ChannelGroup, kept: Tensor) -> Tensor:
    """How much each channel of a group can do: shape (C,), -inf for those that are gone.

    The Euclidean norm of what makes a channel times that of what reads it, each relative to the
    mean over the channels that are left. A norm's scale and shift make a channel where there is
    one, for it undoes the scale of the filter before it; else the filter and its bias do. 0 if
    nothing reads the channel, or if it is made to be zero.

    Args:
        model: In dense shapes; what was removed is zero.
        group: Of channels.
        kept: Indices of those that are left.
    """
    made = _norms(model, group, "norm")
    if made is None:
        made = _norms(model, group, "producer")
    read = _norms(model, group, "consumer")
    strength = torch.ones(group.num_channels, dtype=torch.float64)
    for norms in (made, read):
        if norms is not None:
            strength *= norms / norms[kept].mean().clamp_min(torch.finfo(torch.float64).tiny)
    found = torch.full_like(strength, -math.inf)
    found[kept] = strength[kept]
    return found


def purified(
    model: nn.Module, fitter: Allocator, kept: Mapping[str, Tensor], threshold: float
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Kept counts without the channels that are as good as dead, and what to rank them by.

    Args:
        model: In dense shapes; what was removed is zero.
        fitter: Knows what counts a group may have.
        kept: For each group, the indices of the channels that are left.
        threshold: Strength up to which a channel goes.
    """
    counts, scores = {}, {}
    for group in fitter.groups:
        scores[group.name] = strengths(model, group, kept[group.name])
        alive = int((scores[group.name] > threshold).sum())
        allowed = (*fitter.sizes(group.name), len(kept[group.name]))
        counts[group.name] = min(count for count in allowed if count >= alive)
    return counts, scores


def _norms(model: nn.Module, group: ChannelGroup, role: Role) -> Tensor | None:
    """Euclidean norm of what each channel owns in parameters of a role; None without any."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    squares: Sequence[Tensor] = [
        channel_rows(parameters[member.parameter], member).square().sum(dim=1)
        for member in group.members
        if member.role == role and member.parameter in parameters
    ]
    return torch.stack(list(squares)).sum(dim=0).sqrt() if squares else None
