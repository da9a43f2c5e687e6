"""The topology tools, against dependency sets known by hand, and their exports."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
import torch
import torch.nn.functional as F
from architectures import Concat, Grouped, Plain, Residual, Transformer
from rich.console import Console
from torch import Tensor, nn
from zoo import need

from raycompress.errors import StructureError
from raycompress.structure import analyze, slim
from raycompress.structure.tables import (
    layer_view,
    overview,
    to_csv,
    to_json,
    to_table,
    topology,
)
from raycompress.structure.topology import (
    channel_dependencies,
    frozen_dims,
    layer_rows,
    mask_conflicts,
    step_dependencies,
)

EXAMPLE = (torch.zeros(2, 3, 8, 8),)


def text(shown: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue()


class Stage(nn.Module):
    """A stage of a residual net: the first block changes the width, the second doesn't."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inside, width, 1) if inside != width else nn.Identity()
        self.conv1 = nn.ModuleList([nn.Conv2d(i, width, 3, padding=1) for i in (inside, width)])
        self.conv2 = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for i, short in enumerate((self.down, nn.Identity())):
            x = F.relu(short(x) + self.conv2[i](F.relu(self.conv1[i](x))))
        return x


class Stages(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3), Stage(4, 4), Stage(4, 6), nn.Flatten(), nn.Linear(216, 3)
        )


def test_channel_dependencies_are_those_of_residual_stages() -> None:
    rows = channel_dependencies(analyze(Stages(), EXAMPLE))
    assert {frozenset(r.layers) for r in rows} == {
        frozenset({"0", "1.conv2.0", "1.conv2.1"}),
        frozenset({"1.conv1.0"}),
        frozenset({"1.conv1.1"}),
        frozenset({"2.down", "2.conv2.0", "2.conv2.1"}),
        frozenset({"2.conv1.0"}),
        frozenset({"2.conv1.1"}),
    }
    stem = next(r for r in rows if r.group == "0")
    assert stem.readers == ("1.conv1.0", "1.conv1.1", "2.down", "2.conv1.0")
    # 27 + 1 of the stem, 36 + 1 of both second convolutions, and what the four readers read.
    assert stem.params == 28 + 2 * 37 + 2 * 4 * 9 + 6 * 1 + 6 * 9


def test_concatenated_layers_are_pruned_alone() -> None:
    rows = {r.group: r for r in channel_dependencies(analyze(Concat(), EXAMPLE))}
    assert rows["a.0"].layers == ("a.0",) and rows["b.0"].layers == ("b.0",)
    assert rows["a.0"].readers == rows["b.0"].readers == ("c.0",)
    # a is read twice: 27 + 2 of its norm + 2 * 9 columns of 9 kernels.
    assert rows["a.0"].params == 27 + 2 + 2 * 9 * 9


def test_norms_across_channels_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    (row,) = channel_dependencies(analyze(model, (torch.zeros(2, 3),)))
    assert not row.exact and "LayerNorm '1'" in row.reason


def test_steps_of_grouped_convolutions_and_heads() -> None:
    model = Grouped()
    steps = {(s.layer, s.group): s for s in step_dependencies(analyze(model, EXAMPLE))}
    for (layer, group), row in steps.items():
        assert row.outputs == row.channels * row.step, (layer, group)
    # Whatever the step, one channel less is what slim really takes from the layer.
    structure = analyze(model, EXAMPLE)
    for group in structure.groups:
        small = slim(model, structure, {group.name: range(1, group.num_channels)})
        for layer in group.producers:
            before, after = (m.get_submodule(layer).out_channels for m in (model, small))
            assert before - after == steps[layer, group.name].step
    attention = [
        s for s in step_dependencies(analyze(Transformer(), EXAMPLE)) if s.layer == "attention.qkv"
    ]
    assert [(s.channels, s.step, s.outputs) for s in attention] == [(4, 12, 48)]
    rounded = step_dependencies(analyze(Plain(), EXAMPLE, round_to=4, min_kept=5))
    assert [(s.layer, s.multiple, s.min_kept) for s in rounded] == [
        ("0.0", 4, 8),
        ("2.0", 4, 8),
        ("4", 4, 8),
    ]


def test_frozen_dims_are_sorted_by_reason() -> None:
    rows = {r.reason: r.parameters for r in frozen_dims(analyze(Plain(), EXAMPLE))}
    assert rows["reaches the model's output"] == ("6.weight[0]", "6.bias[0]")
    assert rows["positions of a kernel"] == tuple(
        f"{n}.weight[{d}]" for n in ("0.0", "2.0") for d in (2, 3)
    )


def test_mask_conflicts_name_both_sides_and_what_changes() -> None:
    structure = analyze(Residual(), EXAMPLE)
    stem, b = torch.ones(8, 3, 3, 3), torch.ones(8, 6, 3, 3)
    stem[[1, 2]] = 0
    b[[1, 5]] = 0
    output = torch.ones(5, 10)
    output[3] = 0
    masks = {"stem.0.weight": stem, "b.weight": b, "head.weight": output}
    got = [dataclasses.astuple(r)[1:] for r in mask_conflicts(structure, masks)]
    taken = "layers disagree; intersection taken"
    assert got == [
        ("stem.0", ("b",), (2,), (), taken),
        ("b", ("stem.0",), (5,), (), taken),
        ("head.weight", (), (), (), "reaches the model's output"),
    ]
    got = mask_conflicts(structure, masks, rule="union")
    assert [(r.layer, r.restored, r.also_removed) for r in got[:2]] == [
        ("stem.0", (), (5,)),
        ("b", (), (2,)),
    ]
    b[[1, 5]] = 1
    b[[1, 2]] = 0
    assert mask_conflicts(structure, {"stem.0.weight": stem, "b.weight": b}) == []


def test_layer_rows_are_those_of_the_slim_model() -> None:
    model = Residual()
    structure = analyze(model, EXAMPLE)
    small = slim(model, structure, {"a.0": [0, 3], "stem.0": [1, 2, 7], "c": [0]})
    rows = layer_rows(structure, {"a.0": 2, "stem.0": 3, "down": 1})
    fresh = layer_rows(analyze(small, EXAMPLE))
    assert [r.layer for r in rows] == [r.layer for r in fresh]
    for row, new in zip(rows, fresh, strict=True):
        for name in ("weight", "output", "params", "macs", "flops", "activation_bytes"):
            assert getattr(row, f"kept_{name}") == getattr(new, name), (row.layer, name)
    table = {r.layer: r for r in rows}
    stem = table["stem.0"]
    assert stem.weight == (8, 3, 3, 3) and stem.kept_weight == (3, 3, 3, 3)
    assert stem.output == (2, 8, 8, 8) and stem.kept_output == (2, 3, 8, 8)
    assert (stem.macs, stem.flops) == (8 * 27 * 64, 2 * 8 * 27 * 64)
    assert stem.activation_bytes == 4 * 8 * 64
    total = rows[-1]
    assert total.params == sum(p.numel() for p in model.parameters())
    assert total.kept_params == sum(p.numel() for p in small.parameters())
    for name in ("params", "macs", "flops", "activation_bytes", "kept_macs"):
        assert getattr(total, name) == sum(getattr(r, name) for r in rows[:-1])


def test_counts_that_no_group_has_are_refused() -> None:
    structure = analyze(Residual(), EXAMPLE)
    with pytest.raises(StructureError, match=r"group 'a\.0' has 6 channels, asked for 7"):
        layer_rows(structure, {"a.0": 7})
    with pytest.raises(StructureError, match="no channel group 'nothing'"):
        layer_rows(structure, {"nothing": 1})


def test_exports_hold_every_row_and_field(tmp_path) -> None:
    for name, rows in topology(analyze(Residual(), EXAMPLE)).items():
        to_csv(rows, tmp_path / f"{name}.csv")
        to_json(rows, tmp_path / f"{name}.json")
        fields = [f.name for f in dataclasses.fields(rows[0])]
        lines = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
        plain = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(lines) == len(plain) == len(rows)
        for row, line, entry in zip(rows, lines, plain, strict=True):
            assert list(line) == list(entry) == fields
            for field in fields:
                value = getattr(row, field)
                parts = value if isinstance(value, tuple) else (value,)
                assert line[field] == " ".join(map(str, parts))
                assert entry[field] == (list(value) if isinstance(value, tuple) else value)
    with pytest.raises(ValueError, match="no rows"):
        to_csv([], tmp_path / "none.csv")


@pytest.mark.parametrize("width", [80, 140])
def test_tables_fit_the_terminal_and_cut_no_number(width: int) -> None:
    structure = analyze(Residual(), EXAMPLE)
    shown = "".join(text(part, width) for part in overview(structure, width))
    assert max(map(len, shown.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert "Frozen: parameter[dim]" in shown and "reaches the model's output" in shown
    assert ("FLOPs" in shown) == (width == 140) == ("read by" in shown)
    assert "13.8 k" in shown  # multiply-adds of the stem
    view = text(layer_view(layer_rows(structure, {"stem.0": 3}), width), width)
    assert "13.8 k > 5184" in view and "216 > 81" in view


def test_any_rows_have_a_table() -> None:
    rows = mask_conflicts(
        analyze(Residual(), EXAMPLE), {"b.weight": torch.zeros(8, 6, 3, 3).bool()}
    )
    shown = text(to_table(rows, "Conflicts", ["layer", "against", "restored"]), 100)
    assert "stem.0" in shown and "0, 1, 2, 3, 4, 5 and 2 more" in shown
    assert "layer" in text(to_table([], "Conflicts", ["layer"]), 80)


@pytest.mark.slow
@pytest.mark.zoo
def test_dependency_sets_of_torchvision_resnet18() -> None:
    """The sets that NNI's tests expect of its ChannelDependency."""
    need("torchvision")
    from torchvision.models import resnet18

    rows = channel_dependencies(analyze(resnet18(), (torch.zeros(1, 3, 64, 64),)))
    shared = {frozenset(r.layers) for r in rows if len(r.layers) > 1}
    assert shared == {
        frozenset({"conv1", "layer1.0.conv2", "layer1.1.conv2"}),
        *(
            frozenset({f"layer{i}.0.conv2", f"layer{i}.0.downsample.0", f"layer{i}.1.conv2"})
            for i in (2, 3, 4)
        ),
    }
    assert {r.layers[0] for r in rows if len(r.layers) == 1} == {
        f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)
    }
