"""The criterion contract.

Shapes: C channels of a group, P entries that a channel owns in one parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from raycompress.collect import Collector, Probe
from raycompress.errors import ConfigError
from raycompress.structure import ChannelGroup, Member, Structure

__all__ = ["Criterion", "channel_rows", "parameter_name"]

Statistics = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Criterion(Collector):
    """Scores units of a model, higher = keep; pure: neither the model nor any state is changed.

    The shortest criterion overrides `score`. One that looks at data sets `needs_data`, overrides
    `collect` (which runs on a replica) and reads what it collected in `group_scores` or
    `weight_scores`.

    Attributes:
        combine: How the scores of a group's members become one score for each channel.
    """

    combine: Literal["sum", "mean", "max"] = "sum"

    kind: ClassVar[Literal["channels", "weights"]] = "channels"
    """"channels": scores whole channels; "weights": scores single weights."""
    needs_data: ClassVar[bool] = False
    """Whether statistics are collected first."""
    normalised: ClassVar[bool] = True
    """Each member's scores are divided by their mean magnitude, so that layers of different scale
    weigh the same; false where those of different layers are comparable by themselves."""
    cumulative: ClassVar[bool] = False
    """A channel's score tells what it costs to lose it together with all that have lower ones."""

    def __post_init__(self) -> None:
        if self.combine not in ("sum", "mean", "max"):
            raise ConfigError(
                f"{type(self).__name__}.combine must be 'sum', 'mean' or 'max', "
                f"got {self.combine!r}"
            )

    def check(self, model: nn.Module, structure: Structure, names: Sequence[str]) -> None:
        """Raises a ConfigError for what can't be scored; called before anything is collected."""

    def collect(self, probe: Probe) -> dict[str, Tensor]:
        """Statistics over calibration data; called on a replica if `needs_data`."""
        raise NotImplementedError(f"{type(self).__name__} needs data, and has no collect()")

    def score(self, weight: Tensor) -> Tensor:
        """Scores of one producing parameter.

        Args:
            weight: Shape (C, P): what each channel owns in it; for kind "weights", any shape.

        Returns:
            Shape (C,); for kind "weights", the shape of `weight`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def group_scores(
        self, model: nn.Module, group: ChannelGroup, statistics: Statistics
    ) -> list[Tensor]:
        """Scores of a group's channels, shape (C,) each: one for each member that has a say.

        The default scores every producing parameter of two or more dims; biases go with their
        channel and don't rank it.

        Args:
            model: Dense, on the CPU.
            group: What is scored.
            statistics: What `collect` returned; empty without `needs_data`.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return [
            self.score(channel_rows(parameters[member.parameter], member))
            for member in group.members
            if member.role == "producer"
            and member.parameter in parameters
            and parameters[member.parameter].dim() > 1
        ]

    def weight_scores(self, name: str, weight: Tensor, statistics: Statistics) -> Tensor:
        """Scores of a layer's single weights, of the shape of `weight` (kind "weights")."""
        return self.score(weight)

    def scores(
        self,
        model: nn.Module,
        structure: Structure,
        names: Sequence[str],
        statistics: Statistics,
    ) -> dict[str, Tensor]:
        """Scores by the keys of a ranking: group names, or parameter names for kind "weights".

        Of channels the shape is (C,), of single weights that of the parameter.
        """
        if self.kind == "weights":
            modules = dict(model.named_modules())
            found = {}
            for name in names:
                weight = modules[name].weight
                assert isinstance(weight, Tensor)
                found[parameter_name(name)] = self.weight_scores(
                    name, weight.detach().cpu(), statistics
                )
            return found
        return {name: self._combined(structure.group(name), model, statistics) for name in names}

    def _combined(self, group: ChannelGroup, model: nn.Module, statistics: Statistics) -> Tensor:
        members = [s.double() for s in self.group_scores(model, group, statistics)]
        if not members:  # nothing in the group is of the kind that this criterion looks at
            return torch.zeros(group.num_channels, dtype=torch.float64)
        if self.normalised:
            tiny = torch.finfo(torch.float64).tiny
            members = [scores / scores.abs().mean().clamp_min(tiny) for scores in members]
        stacked = torch.stack(members)
        if self.combine == "max":
            return stacked.amax(dim=0)
        return stacked.sum(dim=0) if self.combine == "sum" else stacked.mean(dim=0)


def parameter_name(layer: str) -> str:
    """Name of a layer's weight in the model."""
    return f"{layer}.weight" if layer else "weight"


def channel_rows(parameter: Tensor, member: Member) -> Tensor:
    """What each channel owns in a parameter, in double precision on the CPU: shape (C, P)."""
    values = parameter.detach().double().cpu()
    indices = torch.as_tensor(member.indices)
    rows = values.index_select(member.dim, indices.flatten()).movedim(member.dim, 0)
    return rows.reshape(len(indices), -1)
