"""The criterion contract, and ranking, which is one for all criteria.

Shapes: C channels of a group, P entries that a channel owns in one parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from raycompress.masks import prune_order
from raycompress.search import Ranking
from raycompress.structure import ChannelGroup, Structure

__all__ = ["Criterion", "rank"]


class Criterion(ABC):
    """Scores units of a model; pure: neither the model nor any state is changed.

    Attributes:
        kind: "channels": scores whole channels; "weights": scores single weights.
    """

    kind: ClassVar[Literal["channels", "weights"]] = "channels"

    @abstractmethod
    def score(self, weight: Tensor) -> Tensor:
        """Scores of one producing parameter, higher = keep.

        Args:
            weight: Shape (C, P): what each channel owns in it; for kind "weights", any shape.

        Returns:
            Shape (C,); for kind "weights", the shape of `weight`.
        """

    def group_scores(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        """Scores of a group's channels, shape (C,).

        The scores of each producing parameter are divided by their mean, so that layers of
        different scale weigh the same, and summed: coupled layers agree by construction.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        total = torch.zeros(group.num_channels, dtype=torch.float64)
        for member in group.members:
            if member.role != "producer" or member.parameter not in parameters:
                continue
            weight = parameters[member.parameter].detach().double().cpu()
            if weight.dim() < 2:
                continue  # biases go with their channel, they don't rank it
            indices = torch.as_tensor(member.indices)
            rows = weight.index_select(member.dim, indices.flatten())
            rows = rows.movedim(member.dim, 0).reshape(group.num_channels, -1)
            scores = self.score(rows)
            total += scores / scores.mean().clamp_min(torch.finfo(torch.float64).tiny)
        return total


def rank(
    criterion: Criterion, model: nn.Module, structure: Structure, names: Sequence[str]
) -> Ranking:
    """The order in which units go, lowest score first, ties by index.

    Args:
        criterion: Scores them.
        model: Dense, on the CPU.
        structure: Of the model.
        names: Channel groups; for a criterion of kind "weights", layers.
    """
    if criterion.kind == "channels":
        scores = {name: criterion.group_scores(model, structure.group(name)) for name in names}
        return Ranking("channels", {name: prune_order(s) for name, s in scores.items()})
    modules = dict(model.named_modules())
    orders = {}
    for name in names:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        orders[f"{name}.weight" if name else "weight"] = prune_order(
            criterion.score(weight.detach().cpu())
        )
    return Ranking("weights", orders)
