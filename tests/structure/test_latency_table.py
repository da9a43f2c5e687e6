"""Tables over layers that take known times of a clock that stands still otherwise."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure import analyze
from raycompress.structure.latency import points
from raycompress.structure.latency.design import Design, layer_groups
from raycompress.structure.latency.table import LatencyTable, TableError, latency_table


class Clock:
    seconds = 0.0
    passes = 0
    stop_at = -1


def clock() -> float:
    return Clock.seconds


class Takes(nn.Linear):
    """A layer that takes `price(in, out)` microseconds."""

    price = staticmethod(lambda i, o: 1.0 * i * o)

    def forward(self, x: Tensor) -> Tensor:
        Clock.seconds += self.price(self.in_features, self.out_features) / 1e6
        return super().forward(x)


class Squared(Takes):
    price = staticmethod(lambda i, o: 2.0 * i * i + 5.0 * o)


class Net(nn.Module):
    """4 -> 10 -> 20 -> 3, and 100 microseconds outside of all layers."""

    def __init__(self, *kinds: type[Takes]) -> None:
        super().__init__()
        self.a, self.b, self.c = kinds[0](4, 10), kinds[1](10, 20), kinds[2](20, 3)

    def forward(self, x: Tensor) -> Tensor:
        Clock.seconds += 100e-6
        Clock.passes += 1
        if Clock.passes == Clock.stop_at:
            raise KeyboardInterrupt
        result: Tensor = self.c(self.b(self.a(x)))
        return result


INPUT = torch.zeros(2, 4)


def table_of(model: nn.Module, **options: Any) -> LatencyTable:
    structure = analyze(model, INPUT)
    Clock.passes = 0
    return latency_table(model, structure, INPUT, clock=clock, **options)


def test_levels_of_a_group() -> None:
    design = Design.of(analyze(Net(Takes, Takes, Takes), INPUT), 5, 0)
    # 0, 0.2, 0.45, 0.7 and 1 of 10 and of 20 channels, and never an empty layer.
    assert design.levels.tolist() == [[1, 2, 4, 7, 10], [1, 4, 9, 14, 20]]


def test_every_pair_of_levels_is_measured_once_and_dense_is_first() -> None:
    design = Design.of(analyze(Net(Takes, Takes, Takes), INPUT), 5, 3)
    assert design.counts[0].tolist() == [10, 20]
    assert len({tuple(row) for row in design.counts.tolist()}) == len(design.counts) == 25
    assert design.checks.shape == (3, 2)


def test_exact_where_times_are_bilinear() -> None:
    model = Net(Takes, Takes, Takes)
    table = table_of(model)
    for a, b in [(10, 20), (1, 1), (6, 11), (9, 2), (3, 19)]:
        expected = (100 + 4 * a + a * b + 3 * b) / 1e3
        assert table.latency_ms({"a": a, "b": b}) == pytest.approx(expected, abs=1e-6)
    assert table.dense_ms == pytest.approx(0.4)
    expected = {"a": 0.024, "b": 0.12, "c": 0.06, "(rest)": 0.1}
    assert table.layers_ms({"a": 6}) == pytest.approx(expected)
    assert abs(table.overhead_ms) < 1e-9 and table.scale == pytest.approx(1)
    assert table.error.num == 8 and table.error.max < 1e-6


def test_interpolation_between_levels_by_hand() -> None:
    table = table_of(Net(Takes, Squared, Takes))
    # b takes 2 * 16 + 45 = 77 at (4, 9), 2 * 49 + 45 = 143 at (7, 9), 25 more at (4 or 7, 14).
    # At (5, 11), a third of the way along a, two fifths along b: 77 + 22 = 99, and 25 * 2 / 5 = 10.
    layers = table.layers_ms({"a": 5, "b": 11})
    assert layers["b"] / table.scale == pytest.approx(0.109)
    assert table.latency_ms({"a": 4, "b": 14}) == pytest.approx((100 + 16 + 102 + 42) / 1e3)
    assert 0 < table.error.mean <= table.error.max < 0.1  # a parabola isn't linear
    assert table.residual.max < 1e-6


def test_layers_that_more_than_two_groups_shape_have_rates() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Takes(4, 8), Takes(4, 8), Takes(4, 16)
            self.d = Takes(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            Clock.seconds += 50e-6
            result: Tensor = self.d(torch.cat([self.a(x), self.b(x), self.c(x)], dim=1))
            return result

    structure = analyze(Wide(), INPUT)
    groups = layer_groups(structure.sizes)
    assert groups["a"] == (0,) and groups["d"] == (0, 1, 2) == groups[""]
    table = table_of(Wide(), checks=4)
    assert table.rated == ("", "d", "(rest)")
    # d takes a microsecond for each multiply-add of one example, so its rate says all.
    kept = {"a": 3, "b": 5, "c": 10}
    assert table.latency_ms(kept) == pytest.approx((50 + 4 * 18 + 2 * 18) / 1e3, rel=1e-6)


def test_graph_form_is_priced_as_a_whole() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x).reshape(-1, 8, 8).reshape(-1, 64))
            return result

    model = Hard()
    structure = analyze(model, INPUT, form="graph")
    table = latency_table(model, structure, INPUT, batch_size=2, visits=1, checks=2)
    parts = table.layers_ms()
    assert parts["(rest)"] > 0 and sum(parts.values()) == parts["(rest)"]
    assert table.dense_ms == pytest.approx(table.overhead_ms + parts["(rest)"])
    assert 0 < table.latency_ms({g.name: 1 for g in structure.groups}) < 10 * table.dense_ms


def test_overhead_and_scale_make_dense_right() -> None:
    """Hooks and caches make whole passes another line of the layers' sum."""
    from raycompress.structure.latency.table import _scale

    sums = np.array([400.0, 300.0, 100.0])
    whole = 30 + 0.8 * sums
    assert _scale(sums, whole) == pytest.approx(0.8)
    # Where slim models are no faster at all, the line would fall: times are proportional then.
    assert _scale(sums, np.array([200.0, 210.0, 220.0])) == pytest.approx(0.5)


def test_error_by_hand() -> None:
    error = TableError.of([1.1, 1.8, 3.0], [1.0, 2.0, 3.0])
    assert (error.num, error.mean, error.max) == (3, pytest.approx(0.2 / 3), pytest.approx(0.1))
    assert error.bias == pytest.approx(0)


def test_the_fastest_visit_counts() -> None:
    class Disturbed(Net):
        def forward(self, x: Tensor) -> Tensor:
            # A disturbance of a millisecond in the last two thirds of the work.
            Clock.seconds += 1e-3 if Clock.passes > 500 else 0.0
            return super().forward(x)

    assert table_of(Disturbed(Takes, Takes, Takes)).dense_ms == pytest.approx(0.4)


def test_a_table_on_disk_is_not_measured_again(tmp_path: Path) -> None:
    first = table_of(Net(Takes, Takes, Takes), folder=tmp_path)
    assert Clock.passes > 33
    again = table_of(Net(Takes, Takes, Takes), folder=tmp_path)
    assert Clock.passes == 0
    assert again.digest == first.digest and again.latency_ms({"a": 3}) == first.latency_ms({"a": 3})


def test_points_measured_before_a_stop_are_kept(tmp_path: Path) -> None:
    table_of(Net(Takes, Takes, Takes))
    whole = Clock.passes
    Clock.stop_at = 500
    try:
        with pytest.raises(KeyboardInterrupt):
            table_of(Net(Takes, Takes, Takes), folder=tmp_path)
    finally:
        Clock.stop_at = -1
    table_of(Net(Takes, Takes, Takes), folder=tmp_path)
    assert 500 + Clock.passes <= whole + 15  # the visit that was stopped, and two to size visits


@pytest.mark.parametrize(
    "damage",
    [
        "{", "[]", '{"key": 1}', '{"visits": {}}', "\x00\xff",
        '{"key": {}, "visits": {}, "complete": true}',
        '{"key": KEY, "visits": {}, "complete": true}',
        '{"key": KEY, "visits": {"0": [[1.0, [1.0]]]}, "complete": false}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = table_of(Net(Takes, Takes, Takes), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_text()
    key = json.dumps(json.loads(good)["key"])
    path.write_bytes(damage.replace("KEY", key).encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        again = table_of(Net(Takes, Takes, Takes), folder=tmp_path)
    assert "is measured anew" in caplog.text and Clock.passes > 33
    assert again.digest == first.digest
    assert json.loads(path.read_text())["key"] == json.loads(good)["key"]


@pytest.mark.parametrize("change", ["device", "batch", "threads", "dtype"])
def test_another_device_and_the_like_is_another_table(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_of(Net(Takes, Takes, Takes), folder=tmp_path)
    model: nn.Module = Net(Takes, Takes, Takes)
    options = {}
    if change == "device":
        monkeypatch.setattr(points, "device_name", lambda device: "another")
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    elif change == "batch":
        options["batch_size"] = 4
    if change == "dtype":
        model = model.double()
        structure = analyze(model, INPUT.double())
        latency_table(model, structure, INPUT.double(), clock=clock, folder=tmp_path)
    else:
        table_of(model, folder=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 2


def test_short_time_takes_fewer_passes_and_stays_complete() -> None:
    model = Net(Takes, Takes, Takes)
    table = table_of(model, max_seconds=0.0)
    # Two to see how long a pass takes; one visit of each model, one pass of each kind, one before.
    assert Clock.passes == 2 + 33 * 3
    assert table.latency_ms({"a": 6}) == pytest.approx((100 + 24 + 120 + 60) / 1e3)


def test_pickles_and_names_what_it_does_not_know() -> None:
    table = table_of(Net(Takes, Takes, Takes))
    assert pickle.loads(pickle.dumps(table)).latency_ms({"a": 2}) == table.latency_ms({"a": 2})
    with pytest.raises(StructureError, match="no channel group 'z'"):
        table.latency_ms({"z": 1})
    with pytest.raises(StructureError, match="levels must be one of 3, 5, 7, got 4"):
        table_of(Net(Takes, Takes, Takes), levels=4)
    with pytest.raises(StructureError, match="the model has none"):
        table_of(Takes(4, 4))
