"""Geometric median: redundancy, whatever the norm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raycompress.criteria import L2, GeometricMedian, fpgm

SCORE = GeometricMedian().score


def random_rows(seed: int, rows: int = 9, size: int = 6) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).double()


def test_by_hand():
    # Distances: 5 to the second, 13 to the third; |(5, 12) - (3, 4)| = sqrt(68).
    rows = torch.tensor([[0.0, 0.0, 1.0], [3.0, 4.0, 1.0], [5.0, 12.0, 1.0]]).double()
    expected = torch.tensor([18.0, 5 + 68**0.5, 13 + 68**0.5]).double()
    torch.testing.assert_close(SCORE(rows), expected)


@given(st.integers(0, 10_000))
def test_equals_the_loop(seed):
    rows = random_rows(seed)
    expected = [sum((a - b).square().sum().sqrt() for b in rows) for a in rows]
    torch.testing.assert_close(SCORE(rows), torch.stack(expected), rtol=1e-12, atol=0)


@given(st.integers(0, 10_000))
def test_translation_changes_nothing_and_magnitude_fails_that(seed):
    rows = random_rows(seed)
    moved = rows + random_rows(seed + 1, 1) * 10
    torch.testing.assert_close(SCORE(moved), SCORE(rows))
    assert not torch.allclose(L2().score(moved), L2().score(rows))


def test_a_duplicate_goes_first_and_ties_are_exact():
    rows = torch.cat([random_rows(0, 1), random_rows(1) * 3, random_rows(0, 1)])
    scores = SCORE(rows)
    assert scores[0] == scores[-1] == scores.min()


def test_the_midpoint_goes():
    a, b = random_rows(0, 1), random_rows(1, 1)
    assert SCORE(torch.cat([a, (a + b) / 2, b])).argmin() == 1


def test_opposite_filters_are_far_apart():
    # |w| or w ** 2 before the distance would make the first two equal, and one of them go.
    row = random_rows(0, 1) * 5
    near = random_rows(1, 1) * 5
    assert SCORE(torch.cat([row, -row, near, near + 0.1, near - 0.1])).argsort()[-1] in (0, 1)


def test_the_order_of_filters_doesnt_matter_to_the_bit():
    rows = random_rows(3, 40, 30)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SCORE(rows[order]), SCORE(rows)[order])


def test_dead_filters_score_zero_and_dont_pull():
    rows = random_rows(4)
    with_dead = torch.cat([rows[:3], torch.zeros(5, 6).double(), rows[3:]])
    scores = SCORE(with_dead)
    assert torch.equal(scores[3:8], torch.zeros(5).double())
    torch.testing.assert_close(torch.cat([scores[:3], scores[8:]]), SCORE(rows))
    # Otherwise the zeros would make the filter nearest to zero the most redundant one.
    assert torch.equal(SCORE(torch.zeros(3, 2).double()), torch.zeros(3).double())


@pytest.mark.parametrize("exact", [1 << 33, 0])
def test_parts_and_matrix_products_agree_with_the_whole(monkeypatch, exact):
    rows = random_rows(5, 50, 20) + 3
    whole = SCORE(rows)
    monkeypatch.setattr(fpgm, "_ENTRIES", 7 * 50)
    monkeypatch.setattr(fpgm, "_EXACT", exact)
    torch.testing.assert_close(SCORE(rows), whole, rtol=1e-8, atol=0)
