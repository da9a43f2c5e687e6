from __future__ import annotations

import pytest
import torch

from raycompress.errors import ConfigError, EvaluationError
from raycompress.quantization.observers import (
    OBSERVERS,
    LeastSquares,
    MinMax,
    Percentile,
    best_threshold,
    capped,
)


@pytest.mark.parametrize("name", OBSERVERS)
def test_how_the_data_is_split_and_ordered_changes_nothing(name: str) -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)) ** 3
    whole, parts = OBSERVERS[name](), OBSERVERS[name]()
    whole.observe(values)
    for part in values.sort().values.abs().mul(values.sort().values.sign()).split(77):
        parts.observe(part)
    assert whole.range(8) == parts.range(8)


def test_min_max_holds_zero() -> None:
    observer = MinMax()
    observer.observe(torch.tensor([2.0, 5.0]))
    assert observer.range(8) == (0.0, 5.0)
    observer.observe(torch.tensor([-1.5]))
    assert observer.range(8) == (-1.5, 5.0)


def test_a_percentile_leaves_out_a_share_of_each_end() -> None:
    # 1 to 100, bins of width 1/16: 98 % of the values are at most 98, in the bin up to 98 + 1/16.
    observer = Percentile(percentile=98)
    observer.observe(torch.arange(1.0, 101.0))
    assert observer.range(8) == (0.0, 98.0625)


def test_least_squares_gives_up_a_rare_value() -> None:
    # At 2 bits [0, 100] has steps of 33: all ones become 0. One value lost costs less than that.
    observer = LeastSquares()
    observer.observe(torch.cat([torch.ones(20000), torch.tensor([100.0])]))
    assert observer.range(2)[1] < 10


def test_kept_bins_diverge_least() -> None:
    # Two levels. All four bins: (2, 2) and (2, 2) are alike, a divergence of 0.
    assert best_threshold(torch.tensor([9, 0, 2, 2]), levels=2) == 4
    # (6, 2, 1) to two levels: 0.0189 with four bins, 0.0174 with three, 0 with two.
    assert best_threshold(torch.tensor([0, 6, 2, 1]), levels=2) == 2
    # Four bins: (8, 8 | 1, 1) to two levels is exact; the zeros' bin is left out.
    assert best_threshold(torch.tensor([0, 8, 1, 1]), levels=2) == 4


def test_entropy_keeps_what_lies_beyond_a_value_that_is_very_frequent() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(5000, generator=generator) * 2
    for frequent in (-0.8, 3.5):  # within the others' range and beyond it
        observer = OBSERVERS["entropy"]()
        observer.observe(torch.cat([spread, torch.full((50000,), frequent)]))
        low, high = observer.range(8)
        assert low <= min(frequent, 0) and high >= max(frequent, 1.9)


def test_no_bin_counts_more_than_is_usual_within_a_level_of_it() -> None:
    # Eight bins to four levels, which are two bins wide: windows are five bins.
    counts = torch.tensor([0, 2, 3, 90, 4, 0, 0, 7])
    # Of 90: (2, 3, 90, 4), without the empty one; of two in the middle the smaller.
    assert capped(counts, 4).tolist() == [0, 2, 3, 3, 4, 0, 0, 7]
    assert capped(torch.tensor([0, 0, 9, 0]), 4).tolist() == [0, 0, 9, 0]  # alone
    assert capped(torch.zeros(4), 2).tolist() == [0, 0, 0, 0]


def test_entropy_is_not_misled_by_constants_of_a_background() -> None:
    # As behind a convolution of images: each channel has its own constant, the rest is spread.
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(20000, generator=generator).pow(2) * 2.9
    constants = torch.rand(30, generator=generator) * 0.45
    observer = OBSERVERS["entropy"]()
    observer.observe(torch.cat([spread, constants.repeat_interleave(5000)]))
    assert observer.range(8)[1] > 2.6


def test_errors() -> None:
    with pytest.raises(ConfigError, match="percentile must be above 50"):
        Percentile(percentile=50)
    with pytest.raises(EvaluationError, match="no activation was observed"):
        MinMax().range(8)
    with pytest.raises(EvaluationError, match="finite"):
        MinMax().observe(torch.tensor([float("nan")]))
