"""The cheapest allocation within limits, exactly: a mixed-integer program over kept counts.

Each group g chooses one of its levels (kept counts); choosing level i costs the loss f_g(i). What a
limit bounds is a sum over groups and pairs of groups, since a layer's cost is a product of its
inputs and its outputs:

    minimise  sum_g f_g(x_g)   subject to   c + sum_g c_g(x_g) + sum_gh c_gh(x_g, x_h) <= limit.

With a binary for each level and, for each pair that meets in a layer, a weight for each pair of
levels whose sums along both axes are those binaries (the local polytope), this is linear. A
separable knapsack, as HALP (arXiv 2110.10811) and SPDY (2201.13096) solve, prices a layer as if its
neighbour stayed whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are used first: replicas need none
from numpy.typing import NDArray

from raycompress.errors import BudgetError

__all__ = ["PairwiseCost", "solve"]

Floats = NDArray[np.float64]
Levels = Mapping[str, Sequence[int]]
Price = Callable[[Mapping[str, int]], float]

MAX_NODES = 20_000
"""Of the search tree, after which the best allocation found so far stands. A number of nodes, and
no time, so that the answer doesn't depend on the machine."""


@dataclass(frozen=True)
class PairwiseCost:
    """A cost as a sum over groups and pairs of groups.

    Attributes:
        constant: With every group at its last level.
        single: What each level of a group adds to that, shape (levels,); 0 at the last.
        pairs: What two groups add beyond their own, shape (levels of one, of the other); 0 along
            the last levels.
    """

    constant: float
    single: Mapping[str, Floats]
    pairs: Mapping[tuple[str, str], Floats]

    @staticmethod
    def of(price: Price, levels: Levels) -> PairwiseCost:
        """Splits a price of kept counts by asking it, one and two groups off the last level.

        Exact where no layer's cost depends on more than two groups in one product; what is beyond
        that is left out, and whoever asked checks the solution with the price itself.

        Args:
            price: Of kept counts of all groups.
            levels: Kept counts that each group may have.
        """
        whole = {name: counts[-1] for name, counts in levels.items()}
        constant = price(whole)
        single = {
            name: np.array([price({**whole, name: count}) - constant for count in counts])
            for name, counts in levels.items()
        }
        pairs = {}
        for one, other in itertools.combinations(levels, 2):

            def beyond(i: int, j: int, one: str = one, other: str = other) -> float:
                counts = {**whole, one: levels[one][i], other: levels[other][j]}
                return float(price(counts) - constant - single[one][i] - single[other][j])

            # Two places, since what two groups do to each other may be nothing at one by accident.
            places = {(0, 0), ((len(levels[one]) - 1) // 2, (len(levels[other]) - 1) // 2)}
            if all(abs(beyond(i, j)) <= 1e-9 * max(abs(constant), 1e-300) for i, j in places):
                continue
            pairs[one, other] = np.array(
                [[beyond(i, j) for j in range(len(levels[other]))] for i in range(len(levels[one]))]
            )
        return PairwiseCost(constant, single, pairs)

    def value(self, chosen: Mapping[str, int]) -> float:
        """The cost of chosen levels, given by their indices."""
        total = self.constant + sum(self.single[name][i] for name, i in chosen.items())
        return float(total + sum(t[chosen[a], chosen[b]] for (a, b), t in self.pairs.items()))


def solve(
    losses: Mapping[str, Floats], limits: Sequence[tuple[PairwiseCost, float]]
) -> dict[str, int]:
    """The levels with the smallest sum of losses within all limits.

    Args:
        losses: For each group the loss at each of its levels.
        limits: Costs, each with what it may be at most.

    Returns:
        The index of each group's level.

    Raises:
        BudgetError: No choice of levels is within the limits.
    """
    first: dict[str, int] = {}
    size = 0
    for name, values in losses.items():
        first[name] = size
        size += len(values)
    num_binaries = size
    pairs = sorted({pair for cost, _ in limits for pair in cost.pairs})
    tables: dict[tuple[str, str], int] = {}
    for one, other in pairs:
        tables[one, other] = size
        size += len(losses[one]) * len(losses[other])

    objective = np.zeros(size)
    for name, values in losses.items():
        objective[first[name] : first[name] + len(values)] = values
    objective /= max(float(np.abs(objective).max()), 1e-300)
    constraints = [_choices(losses, first, tables, size)]
    for cost, limit in limits:
        row = np.zeros(size)
        for name, amounts in cost.single.items():
            row[first[name] : first[name] + len(amounts)] = amounts
        for pair, table in cost.pairs.items():
            row[tables[pair] : tables[pair] + table.size] = table.ravel()
        scale = max(abs(cost.constant), abs(limit), 1e-300)
        bound = (limit - cost.constant) / scale
        constraints.append(scipy.optimize.LinearConstraint(row[None] / scale, -np.inf, bound))
    integrality = np.zeros(size)
    integrality[:num_binaries] = 1
    answer = scipy.optimize.milp(
        objective,
        integrality=integrality,
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=constraints,
        options={"node_limit": MAX_NODES, "mip_rel_gap": 1e-6},
    )
    if answer.x is None:
        raise BudgetError(f"no allocation within the limits was found: {answer.message}")
    return {
        name: int(np.argmax(answer.x[first[name] : first[name] + len(values)]))
        for name, values in losses.items()
    }


def _choices(
    losses: Mapping[str, Floats],
    first: Mapping[str, int],
    tables: Mapping[tuple[str, str], int],
    size: int,
) -> scipy.optimize.LinearConstraint:
    """One level for each group, and pairs of levels that agree with both groups' choices."""
    rows: list[int] = []
    columns: list[int] = []
    entries: list[float] = []
    right: list[float] = []

    def add(positive: Sequence[int], negative: Sequence[int], value: float) -> None:
        rows.extend([len(right)] * (len(positive) + len(negative)))
        columns.extend([*positive, *negative])
        entries.extend([1.0] * len(positive) + [-1.0] * len(negative))
        right.append(value)

    for name, values in losses.items():
        add(range(first[name], first[name] + len(values)), [], 1.0)
    for (one, other), start in tables.items():
        table = start + np.arange(len(losses[one]) * len(losses[other])).reshape(
            len(losses[one]), len(losses[other])
        )
        for i in range(len(losses[one])):
            add(table[i].tolist(), [first[one] + i], 0.0)
        for j in range(len(losses[other])):
            add(table[:, j].tolist(), [first[other] + j], 0.0)
    matrix = scipy.sparse.coo_array((entries, (rows, columns)), shape=(len(right), size)).tocsc()
    return scipy.optimize.LinearConstraint(matrix, right, right)
