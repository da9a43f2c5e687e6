from __future__ import annotations

import pytest
import torch
from architectures import Plain
from torch import nn

from raycompress.structure import analyze, file_size, measure, slim


def test_rows_for_each_model_and_batch_size() -> None:
    model = Plain().train()
    structure = analyze(model, (torch.zeros(2, 3, 8, 8),))
    small = slim(model, structure, {"0.0": [1, 2]})
    rows = measure(
        {"dense": model, "slim": small}, (torch.zeros(2, 3, 8, 8),), batch_sizes=(1, 5), repeats=3
    )
    assert [(r.name, r.batch_size, r.repeats) for r in rows] == [
        ("dense", 1, 3), ("slim", 1, 3), ("dense", 5, 3), ("slim", 5, 3),
    ]  # fmt: skip
    assert all(0 < r.min_ms <= r.p10_ms <= r.median_ms <= r.p90_ms for r in rows)
    assert model.training
    assert [r.file_bytes for r in rows[:2]] == [file_size(model), file_size(small)]
    assert file_size(small) < file_size(model)
    assert rows[1].peak_bytes < rows[0].peak_bytes < rows[2].peak_bytes


class Waits(nn.Module):
    """Takes as many seconds of a clock that stands still otherwise as its list says, in turn."""

    now = 0.0

    def __init__(self, seconds: list[float], log: list[str], name: str) -> None:
        super().__init__()
        self.seconds, self.log, self.name = iter(seconds), log, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Waits.now += next(self.seconds)
        self.log.append(self.name)
        return x


def test_median_and_spread_of_timed_passes_alone() -> None:
    # The pass whose memory is measured and two passes of warm-up come before.
    model = Waits([9.0, 9.0, 9.0, 0.003, 0.001, 0.005, 0.002, 0.004], [], "a")
    (row,) = measure(
        {"a": model}, torch.zeros(1, 1), batch_sizes=(1,), repeats=5, warmup=2,
        device="cpu", clock=lambda: Waits.now,
    )  # fmt: skip
    expected = (3.0, 1.4, 4.6, 1.0)
    assert (row.median_ms, row.p10_ms, row.p90_ms, row.min_ms) == pytest.approx(expected)
    assert row.repeats == 5 and row.peak_bytes == 0


def test_order_changes_and_each_turn_has_every_model() -> None:
    log: list[str] = []
    models = {name: Waits([0.1] * 100, log, name) for name in "abc"}
    measure(models, torch.zeros(1, 1), batch_sizes=(1,), repeats=20, warmup=0, clock=lambda: 0.0)
    turns = ["".join(log[i : i + 3]) for i in range(3, 63, 3)]  # after the passes for memory
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) == 6  # all orders come up


@pytest.mark.parametrize(("limit", "repeats"), [(None, 6), (1.0, 1), (5.5, 4), (100.0, 6)])
def test_no_turn_starts_after_the_time_is_up(limit: float | None, repeats: int) -> None:
    # Memory and warm-up take a second each: turns start at 2, 3, 4, ... seconds.
    Waits.now = 0.0
    (row,) = measure(
        {"a": Waits([1.0] * 20, [], "a")}, torch.zeros(1, 1), batch_sizes=(1,), repeats=6,
        warmup=1, max_seconds=limit, device="cpu", clock=lambda: Waits.now,
    )  # fmt: skip
    assert row.repeats == repeats


def test_peak_memory_is_that_of_two_live_tensors() -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = torch.relu(x)  # the one before lives until this one is made
            return x

    (row,) = measure({"a": Chain()}, torch.zeros(1, 1000), batch_sizes=(8,), repeats=1)
    assert row.peak_bytes == 2 * 8 * 1000 * 4
