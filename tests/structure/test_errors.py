"""Bad input gets a clear error; what can't be pruned is reported, never raised."""

from __future__ import annotations

import pytest
import torch
from architectures import Plain, Residual, SqueezeExcite
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure import Call, analyze, elementwise, register_operator, slim

EXAMPLE = (torch.zeros(1, 3, 8, 8),)


@torch.library.custom_op("raycompress_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("raycompress_test::gate", mutates_args=())
def gate(x: Tensor, y: Tensor) -> Tensor:
    return x * y.sigmoid()


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 6), (6, 2)))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(opaque(self.a(x))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(gate(self.a(x), self.b(x)))


def test_unknown_operator_freezes_and_is_reported_with_what_was_never_touched() -> None:
    structure = analyze(Opaque(), EXAMPLE)
    assert [g.name for g in structure.groups] == ["b"]
    assert structure.unknown_ops == {"raycompress_test::opaque": ""}
    assert structure.untouched == ("unused.weight", "unused.bias")
    reasons = {(f.parameter, f.dim): f.reason for f in structure.frozen}
    assert "no rule" in reasons["a.weight", 0]
    assert "output" in reasons["c.weight", 0]


def test_a_rule_for_an_operator_can_be_registered() -> None:
    calls: list[str] = []

    def rule(call: Call) -> None:
        calls.append(call.name)
        elementwise(call)

    register_operator("raycompress_test::gate", rule)
    group = analyze(Gated(), EXAMPLE).group("a")
    assert group.producers == ("a", "b") and calls == ["raycompress_test::gate"]


@pytest.mark.parametrize("ignore", ["a", "Conv2d"])
def test_protected_modules_keep_their_channels(ignore: str) -> None:
    structure = analyze(Residual(), EXAMPLE, ignore=(ignore,))
    produced = {p for g in structure.groups for p in g.producers}
    assert not any(p.startswith("a") for p in produced)


def test_unknown_names_are_refused() -> None:
    structure = analyze(Plain(), EXAMPLE)
    with pytest.raises(StructureError, match="no such parameter"):
        structure.kept({"nothing": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(StructureError, match="no channel group 'nothing'"):
        structure.masks({"nothing": [0]})
    with pytest.raises(StructureError, match="no module is named"):
        analyze(Plain(), EXAMPLE, ignore=("nothing",))


def test_wrong_shapes_and_empty_layers_are_refused() -> None:
    model = Plain()
    structure = analyze(model, EXAMPLE)
    with pytest.raises(StructureError, match=r"has shape \(3,\)"):
        structure.kept({"0.0.weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(StructureError, match="empty"):
        slim(model, structure, {"0.0": []})
    with pytest.raises(StructureError, match="twice"):
        slim(model, structure, {"0.0": [1, 1]})
    with pytest.raises(StructureError, match=r"channels 0\.\.7"):
        slim(model, structure, {"0.0": [8]})
    with pytest.raises(StructureError, match="isn't the one analysed"):
        slim(Residual(), structure, {"0.0": [1]})


def test_output_channels_and_incomplete_masks_are_refused() -> None:
    structure = analyze(Plain(), EXAMPLE)
    output = torch.ones(5, 20, dtype=torch.bool)
    output[2] = False
    with pytest.raises(StructureError, match="reaches the model's output"):
        structure.kept({"6.weight": output})
    single = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    single[3] = False
    with pytest.raises(StructureError, match="incomplete"):
        structure.kept({"0.0.weight": single})


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(StructureError, match="doesn't run on the example inputs"):
        analyze(Plain(), (torch.zeros(1, 4, 8, 8),))


def test_groups_tell_their_producers_and_roles() -> None:
    structure = analyze(SqueezeExcite(), EXAMPLE)
    group = structure.group("stem.0")
    assert group.producers == ("stem.0", "excite") and group.num_channels == 8
    roles = {(m.parameter, m.dim): m.role for m in group.members}
    assert roles["stem.0.weight", 0] == "producer" and roles["head.weight", 1] == "consumer"
    assert roles["stem.1.running_mean", 0] == "norm" and roles["scale", 0] == "elementwise"
