"""A given sparsity for each channel group, brought to the budget."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raycompress.candidate import Candidate
from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.masks import num_kept
from raycompress.pruning.pruner import Problem, Pruner, allocator
from raycompress.pruning.units import check_counts
from raycompress.recalibration import check_recalibration
from raycompress.reconstruction import Reconstruction
from raycompress.search import Search
from raycompress.structure import ChannelGroup
from raycompress.wording import near

__all__ = ["FixedAllocation", "matching"]


@dataclass(frozen=True, kw_only=True)
class FixedAllocation(Pruner):
    """Removes what you say from each channel group, by one criterion.

    Without a budget, floor(n * sparsity) of a group's n channels go. With one, sparsities say only
    how groups stand to each other: the fractions kept, 1 - sparsity, are scaled by one factor, each
    capped at 1, and the largest allocation of that shape within the budget is taken. So every
    choice of sparsities meets the budget, which makes them a space that can be sampled: `tune`.

    Attributes:
        sparsities: For each pattern ("layer1.*") of layer names, the fraction removed, in [0, 1);
            the first pattern that matches a layer of a group counts, and groups that none matches
            stay whole (with a budget: have sparsity 0). One that matches no group is refused.
        criterion: Which channels of a group go first: a name such as "l1", or an import path.
        reconstruct: Layers that lose inputs imitate the dense ones by least squares on calibration
            data.
        recalibrate: Calibration batches for norm statistics; 0: none.
        round_to: Kept counts are multiples of this.
        min_kept: Never fewer channels in a group.
    """

    sparsities: dict[str, float] = field(default_factory=dict)
    criterion: str = "l1"
    reconstruct: bool = False
    recalibrate: int = 0
    round_to: int = 1
    min_kept: int = 1

    def __post_init__(self) -> None:
        criterion(self.criterion, "FixedAllocation.criterion", "channels")
        check_counts("FixedAllocation", self.round_to, self.min_kept)
        if self.recalibrate < 0:
            raise ConfigError(
                f"FixedAllocation.recalibrate must be at least 0, got {self.recalibrate}"
            )
        for pattern, sparsity in self.sparsities.items():
            if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
                raise ConfigError(
                    f"FixedAllocation.sparsities: {pattern!r} must be in [0, 1), got {sparsity:g}"
                )

    def search(self, problem: Problem) -> Search:
        """Returns as soon as the channels are scored."""
        groups = problem.groups()
        fixed = [name for name, choice in groups.items() if choice.sparsity is not None]
        if fixed:
            raise ConfigError(
                f"targets give {fixed[0]!r} a sparsity, which FixedAllocation.sparsities does"
            )
        chosen = [problem.structure.group(name) for name in groups]
        sparsity = {name: 0.0 for name in groups}
        for pattern, names in matching(self.sparsities, chosen):
            sparsity |= dict.fromkeys(names, self.sparsities[pattern])
        if problem.budget is None:
            counts = {
                group.name: num_kept(
                    group.num_channels,
                    sparsity[group.name],
                    round_to=math.lcm(self.round_to, group.multiple),
                    min_kept=max(self.min_kept, group.min_kept),
                )
                for group in chosen
            }
        else:
            fit = allocator(
                problem, list(groups), "FixedAllocation", self.round_to, self.min_kept
            ).fit
            counts = fit({name: 1 - each for name, each in sparsity.items()})
        yield from check_recalibration(problem.weights, self.recalibrate)
        ranks = criterion(self.criterion, "FixedAllocation.criterion", "channels")
        ranking = yield from problem.rank(ranks, list(groups))
        winner: Candidate = problem.candidate(counts, ranking, recalibrate=self.recalibrate)
        if self.reconstruct and winner.kept:
            winner = replace(winner, reconstruct=Reconstruction(problem.weights))
        return winner


def matching(
    patterns: Mapping[str, object],
    groups: Sequence[ChannelGroup],
    key: str = "FixedAllocation.sparsities",
) -> Iterator[tuple[str, list[str]]]:
    """For each pattern in order, the names of the groups that it is the first to match.

    Args:
        patterns: Keys are shell patterns ("layer?.*") of the groups' layers.
        groups: In the model's order.
        key: For messages.

    Raises:
        ConfigError: A pattern matches no layer of any group.
    """
    left = {group.name: group for group in groups}
    layers = [layer for group in groups for layer in (group.name, *group.producers)]
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise ConfigError(
                f"{key}: {pattern!r} matches no layer that can be pruned{near(pattern, layers)}"
            )
        found = [
            name
            for name, group in left.items()
            if fnmatch.filter((name, *group.producers), pattern)
        ]
        for name in found:
            del left[name]
        yield pattern, found
