"""Network Slimming (Liu et al. 2017, arXiv 1708.06519): one threshold on all norms' factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from raycompress.criteria import BNScale, Criterion
from raycompress.criteria.bn_scale import scale_factors
from raycompress.errors import ConfigError
from raycompress.pruning.one_shot import ChannelPruner
from raycompress.pruning.pruner import Problem
from raycompress.search import Search

__all__ = ["Slim"]


@dataclass(frozen=True, kw_only=True)
class Slim(ChannelPruner):
    """Removes the channels whose norms scale them least, with one threshold over the model.

    Groups of channels that no norm scales are not among those that compete, and keep all their
    channels. No group is emptied.

    Deviation from the paper: the model is pruned as it is. Many factors are near zero only after
    training with a penalty on their absolute values.

    Attributes:
        scope: "global": one threshold, as in the paper; "group": the same fraction of each group.
    """

    scope: Literal["group", "global"] = "global"

    def scorer(self) -> Criterion:
        """|gamma|, averaged over the norms of a group."""
        return BNScale()

    def search(self, problem: Problem) -> Search:
        """Returns at once."""
        scaled = tuple(group for group in problem.structure.groups if scale_factors(group))
        if not scaled:
            raise ConfigError(
                "Slim ranks channels by the scale factors of their norms, and no channel group of "
                "this model has a norm with such factors"
            )
        return super().search(replace(problem, structure=replace(problem.structure, groups=scaled)))
