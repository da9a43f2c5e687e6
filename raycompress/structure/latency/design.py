"""Which slim models a latency table is measured on: an orthogonal array over the channel groups.

Each channel group has q levels (kept counts; q is a prime) and a colour; at point (i, j) a group of
colour c is at level (i + c * j) mod q. Two groups of different colours then meet in each of their
q * q pairs of levels exactly once, and groups that shape one layer get different colours: q * q
models measure the whole grid of every such layer. j = 0 gives the uniform models, (q - 1, 0) the
dense one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from raycompress.structure.cost import CostModel, Ints
from raycompress.structure.model import ChannelGroup, Structure

__all__ = ["FRACTIONS", "Design", "layer_groups"]

FRACTIONS = {
    3: (0.0, 0.5, 1.0),
    5: (0.0, 0.2, 0.45, 0.7, 1.0),
    7: (0.0, 0.1, 0.25, 0.4, 0.6, 0.8, 1.0),
}
"""Levels as fractions of a group's channels, by how many there are."""


def layer_groups(sizes: CostModel) -> dict[str, tuple[int, ...]]:
    """Positions of the groups whose kept counts shape what a module itself holds or computes."""
    found = {}
    for at, name in enumerate(sizes.layers):
        used = np.unique(sizes.layer_factors[sizes.owner == at])
        found[name] = tuple(int(g) for g in np.flatnonzero(sizes.slope[used].any(axis=0)))
    return found


@dataclass(frozen=True, eq=False)
class Design:
    """Which slim models are measured.

    Attributes:
        levels: kept counts of each group, ascending, shape (groups, q).
        colours: of each group, in 0..q-1, shape (groups,).
        counts: kept counts of each measured model, the dense one first, shape (points, groups).
        places: (i, j) of each of them, shape (points, 2).
        checks: kept counts of random models that only judge the table, shape (checks, groups).
    """

    levels: Ints
    colours: Ints
    counts: Ints
    places: Ints
    checks: Ints

    @staticmethod
    def of(structure: Structure, num_levels: int, num_checks: int) -> Design:
        """The design for a structure."""
        groups = structure.groups
        levels = np.array([_levels(g, FRACTIONS[num_levels]) for g in groups], dtype=np.int64)
        pairs = {tuple(p) for p in layer_groups(structure.sizes).values() if len(p) == 2}
        colours = _coloured(pairs, len(groups), num_levels)
        q = num_levels
        # One colour alone means that no two groups meet in a layer: uniform models say it all.
        columns = range(q) if colours.any() else range(1)
        places = [(i, j) for j in columns for i in reversed(range(q))]
        at = np.array([[(i + c * j) % q for c in colours] for i, j in places], dtype=np.int64)
        counts = levels[np.arange(len(groups)), at]
        rng = random.Random(0)
        checks = []
        for _ in range(num_checks):
            # Around a common fraction: independent ones would all cost about the same.
            common = rng.uniform(0.15, 1.0)
            wanted = [min(max(common + rng.uniform(-0.3, 0.3), 0.0), 1.0) for _ in groups]
            checks.append([_count(g, w) for g, w in zip(groups, wanted, strict=True)])
        return Design(
            levels,
            colours,
            counts,
            np.array(places, dtype=np.int64),
            np.array(checks, dtype=np.int64).reshape(-1, len(groups)),
        )


def _count(group: ChannelGroup, fraction: float) -> int:
    return group.round_up(round(fraction * group.num_channels))


def _levels(group: ChannelGroup, fractions: tuple[float, ...]) -> list[int]:
    return [_count(group, fraction) for fraction in fractions]


def _coloured(pairs: set[tuple[int, ...]], num_groups: int, num_colours: int) -> Ints:
    """A colour for each group, different within each pair as far as the colours go."""
    meets: dict[int, set[int]] = {g: set() for g in range(num_groups)}
    for a, b in pairs:
        meets[a].add(b)
        meets[b].add(a)
    colours = np.full(num_groups, -1, dtype=np.int64)
    for g in sorted(meets, key=lambda g: (-len(meets[g]), g)):
        taken = [int(colours[h]) for h in meets[g] if colours[h] >= 0]
        colours[g] = min(range(num_colours), key=lambda c: (taken.count(c), c))
    return colours
