"""The solver against brute force, and costs split into pairs against the costs themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raycompress.errors import BudgetError
from raycompress.pruning.solver import PairwiseCost, solve
from raycompress.structure import analyze


def _brute_force(
    losses: dict[str, np.ndarray], limits: list[tuple[PairwiseCost, float]]
) -> float | None:
    """The smallest loss within all limits, by trying everything."""
    best = None
    for choice in itertools.product(*(range(len(values)) for values in losses.values())):
        chosen = dict(zip(losses, choice, strict=True))
        if all(cost.value(chosen) <= limit for cost, limit in limits):
            loss = float(sum(losses[name][i] for name, i in chosen.items()))
            best = loss if best is None else min(best, loss)
    return best


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    share=st.floats(0.05, 1.0),
    num_limits=st.integers(1, 2),
)
def test_solver_is_brute_force(seed: int, sizes: list[int], share: float, num_limits: int) -> None:
    rng = np.random.default_rng(seed)
    levels = {f"g{i}": sorted(rng.choice(9, size, False) + 1) for i, size in enumerate(sizes)}
    losses = {name: rng.integers(0, 50, len(counts)) / 7 for name, counts in levels.items()}
    limits = []
    for _ in range(num_limits):
        weights = rng.integers(0, 5, (len(levels), len(levels)))

        def price(counts: object, weights: np.ndarray = weights) -> float:
            x = np.array([counts[name] for name in levels])  # type: ignore[index]
            return float(x @ weights @ x + x.sum())

        cost = PairwiseCost.of(price, levels)
        values = [
            price(dict(zip(levels, choice, strict=True)))
            for choice in itertools.product(*levels.values())
        ]
        # Between two values, so that rounding doesn't decide.
        limits.append((cost, min(values) + share * (max(values) - min(values)) + 0.5))
    expected = _brute_force(losses, limits)
    if expected is None:
        with pytest.raises(BudgetError, match="no allocation within the limits"):
            solve(losses, limits)
        return
    chosen = solve(losses, limits)
    assert all(cost.value(chosen) <= limit for cost, limit in limits)
    assert sum(losses[name][i] for name, i in chosen.items()) == pytest.approx(expected, abs=1e-6)


class _Net(nn.Module):
    """Convolutions in a row, a residual sum and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.c = nn.Conv2d(6, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 5, 1)
        self.e = nn.Conv2d(13, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x + self.c(self.b(x).relu())
        x = torch.cat([x, self.d(x)], dim=1)
        out: Tensor = self.head(self.e(x).relu().mean(dim=(2, 3)))
        return out


@pytest.mark.parametrize("resource", ["macs", "params"])
def test_pairs_give_a_real_models_cost(resource: str) -> None:
    structure = analyze(_Net().eval(), (torch.randn(1, 3, 6, 6),))
    levels = {
        g.name: sorted({1, g.num_channels // 2, g.num_channels - 1, g.num_channels})
        for g in structure.groups
    }

    def price(counts: object) -> float:
        return float(getattr(structure.cost(counts), resource))  # type: ignore[arg-type]

    cost = PairwiseCost.of(price, levels)
    for choice in itertools.product(*(range(len(counts)) for counts in levels.values())):
        chosen = dict(zip(levels, choice, strict=True))
        counts = {name: levels[name][i] for name, i in chosen.items()}
        assert cost.value(chosen) == pytest.approx(price(counts), abs=1e-6)
    # Groups that meet in a layer, and no others.
    assert 0 < len(cost.pairs) < len(levels) * (len(levels) - 1) // 2


def test_neighbours_are_priced_together() -> None:
    """Two layers a x b: a separable price would keep 2 + 2 of 4 x 4; together 1 x 4 is better."""
    levels = {"a": [1, 2, 4], "b": [1, 2, 4]}
    cost = PairwiseCost.of(lambda n: float(n["a"] * n["b"]), levels)
    losses = {"a": np.array([1.0, 0.5, 0.0]), "b": np.array([9.0, 3.0, 0.0])}
    assert solve(losses, [(cost, 4.0)]) == {"a": 0, "b": 2}
    assert solve(losses, [(cost, 8.0)]) == {"a": 1, "b": 2}
    assert solve(losses, [(cost, 16.0)]) == {"a": 2, "b": 2}
