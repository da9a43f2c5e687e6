"""Scale factors of norms: channels that a norm multiplies by little matter little.

Liu et al. 2017, arXiv 1708.06519 (Network Slimming).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from raycompress.criteria.criterion import Criterion, Statistics, channel_rows
from raycompress.errors import ConfigError
from raycompress.structure import ChannelGroup, Member

__all__ = ["BNScale", "scale_factors"]


def scale_factors(group: ChannelGroup) -> list[Member]:
    """The group's members that are scale factors (gamma) of norms."""
    return [m for m in group.members if m.role == "norm" and m.parameter.endswith("weight")]


@dataclass(frozen=True, kw_only=True)
class BNScale(Criterion):
    """|gamma| of the norms behind a channel, averaged over them.

    Of BatchNorm, as in the paper, and of the other norms with a factor for each channel. Only
    models that were trained with a penalty on gamma have many that are near zero.

    Attributes:
        combine: How the factors of several norms become one score for each channel. The mean
            keeps channels with many norms comparable with those that have one.
    """

    combine: Literal["sum", "mean", "max"] = "mean"

    normalised: ClassVar[bool] = False

    def group_scores(
        self, model: nn.Module, group: ChannelGroup, statistics: Statistics
    ) -> list[Tensor]:
        """|gamma| in each norm; the mean where a channel has several factors in one.

        Raises:
            ConfigError: No norm scales the group's channels.
        """
        factors = scale_factors(group)
        if not factors:
            raise ConfigError(
                f"group {group.name!r} has no norm with scale factors, which 'bn_scale' ranks by: "
                "exclude it in targets, or take another criterion"
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return [
            channel_rows(parameters[member.parameter], member).abs().mean(dim=1)
            for member in factors
        ]
