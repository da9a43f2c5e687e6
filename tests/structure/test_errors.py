"""Bad input gets a clear error; what can't be pruned is reported, never raised."""

from __future__ import annotations

import re

import pytest
import torch
from architectures import Plain, Residual, SqueezeExcite, Transformer
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure import (
    Call,
    analyze,
    elementwise,
    expand,
    register_operator,
    slim,
    verify,
)
from raycompress.structure.rules import operators

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


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.b(self.a(x) * scale)


def test_inputs_that_do_not_fit_name_what_was_given_and_where_it_stops() -> None:
    stops = r"\(float32 \(1, 4, 8, 8\)\): it stops in '0\.0' \(Conv2d\): RuntimeError: .*3 channels"
    with pytest.raises(StructureError, match=stops):
        analyze(Plain(), (torch.zeros(1, 4, 8, 8),))
    stops = r"\(int64 \(1, 3\)\).* stops in Pair: TypeError: .*'scale'"
    with pytest.raises(StructureError, match=stops):
        analyze(Pair(), torch.zeros(1, 3, dtype=torch.int64))
    stops = r"\(x=float32 \(1, 3\), factor=float\).*unexpected keyword argument 'factor'"
    with pytest.raises(StructureError, match=stops):
        analyze(Pair(), {"x": torch.zeros(1, 3), "factor": 1.0})
    stops = r"\(str, float32 \(1,\)\).*stops in 'a' \(Linear\)"
    with pytest.raises(StructureError, match=stops):
        analyze(Pair(), ("text", torch.zeros(1)))
    for nothing in (None, 3, nn.Linear(1, 1)):
        with pytest.raises(StructureError, match=f"got {type(nothing).__name__}"):
            analyze(Plain(), nothing)
    with pytest.raises(StructureError, match=r"a mapping is of names, got \[0\]"):
        analyze(Plain(), {0: EXAMPLE[0]})


def test_a_rule_that_fails_is_not_blamed_on_the_inputs() -> None:
    def broken(call: Call) -> None:
        raise RuntimeError("broken rule")

    register_operator("raycompress_test::opaque", broken)
    try:
        with pytest.raises(RuntimeError, match="broken rule"):
            analyze(Opaque(), EXAMPLE)
    finally:
        operators._RULES.pop("raycompress_test::opaque")


def test_unknown_masks_are_refused_with_a_hint() -> None:
    structure = analyze(Residual(), EXAMPLE)
    mask = torch.ones(6, 8, 3, 3)
    for masks, hint in (
        (
            {"a.0.weigth": mask},
            r"'a\.0\.weigth': .*; did you mean 'a\.0\.weight'",
        ),
        ({"a.0": mask}, r"'a\.0' is a module; name 'a\.0\.weight', or give"),
        ({"a.1.running_mean": torch.ones(6)}, r"'a\.1\.running_mean': .* no such parameter"),
        ({"a.9": {"weight": mask}}, r"'a\.9\.weight': .* no such parameter"),
        ({"a.0": {"weight": mask[:5]}}, r"has shape \(5, 8, 3, 3\), the parameter \(6, 8, 3, 3\)"),
        ({"a.0.weight": [1, 2]}, r"'a\.0\.weight' must be a tensor, got list"),
    ):
        for read in (structure.kept, structure.complete, lambda m: slim(None, structure, masks=m)):
            with pytest.raises(StructureError, match=hint):
                read(masks)


def test_output_channels_are_named_wherever_they_are_asked_for() -> None:
    model = Plain()
    structure = analyze(model, EXAMPLE)
    frozen = r"no channel group '6': .*can't be pruned \(reaches the model's output\)"
    for ask in (
        lambda: slim(model, structure, {"6": [0, 1]}),
        lambda: structure.masks({"6": [0, 1]}),
        lambda: structure.cost({"6": 2}),
        lambda: structure.group("6"),
    ):
        with pytest.raises(StructureError, match=frozen):
            ask()
    with pytest.raises(StructureError, match=r"no channel group 'x'; groups are 0\.0, 2\.0, 4$"):
        structure.group("x")


def test_a_layer_is_never_empty() -> None:
    model = Plain()
    structure = analyze(model, EXAMPLE)
    empty = r"group '2\.0' can keep 1 to 12 channels, asked for 0; a layer would be empty"
    with pytest.raises(StructureError, match=empty):
        slim(model, structure, {"2.0": []})
    masks = structure.masks({"2.0": [0]})
    gone = {k: torch.zeros_like(v) for k, v in masks.items() if not k.startswith("4")}
    with pytest.raises(StructureError, match="the layer would be empty"):
        slim(model, structure, masks=gone)
    assert len(structure.complete(gone).kept["2.0"]) == 1


@pytest.mark.parametrize(
    ("limits", "kept", "allowed"),
    [
        ({"round_to": 8}, 11, "a multiple of 8 channels from 8 on, or all 12"),
        ({"round_to": 4, "min_kept": 5}, 4, "a multiple of 4 channels from 8 on, or all 12"),
        ({"min_kept": 5}, 4, "5 to 12 channels"),
        ({"round_to": 16}, 11, "all 12 channels"),
        ({"min_kept": 99}, 11, "all 12 channels"),
    ],
)
def test_limits_name_group_what_was_asked_and_what_is_allowed(
    limits: dict[str, int], kept: int, allowed: str
) -> None:
    model = Plain()
    structure = analyze(model, EXAMPLE, **limits)
    match = re.escape(f"group '2.0' can keep {allowed}, asked for {kept}")
    with pytest.raises(StructureError, match=match):
        slim(model, structure, {"2.0": range(kept)})
    group = structure.group("2.0")
    for count in range(1, 13):
        got = group.round_up(count)
        assert len(structure.indices({"2.0": range(got)})["2.0"]) == got >= count
    small = slim(model, structure, {"2.0": range(group.round_up(1))})
    assert small(EXAMPLE[0]).shape == (1, 5)


def test_heads_count_as_many_outputs_when_rounded() -> None:
    structure = analyze(Transformer(), EXAMPLE, round_to=8)
    heads = structure.group("attention.qkv")
    assert heads.num_channels == 4 and heads.multiple == 2  # 4 outputs of q, k and v for a head
    assert structure.group("up").multiple == 8
    for limits in ({"round_to": 0}, {"min_kept": -1}):
        (key,) = limits
        with pytest.raises(StructureError, match=f"{key} must be at least 1"):
            structure.limited(**limits)


def test_slim_takes_kept_or_masks() -> None:
    model = Plain()
    structure = analyze(model, EXAMPLE)
    for options in ({}, {"kept": {}, "masks": {}}):
        with pytest.raises(StructureError, match="either kept channels or masks"):
            slim(model, structure, **options)
    kept = {"0.0": [1, 5]}
    by_index = slim(model, structure, kept).state_dict()
    by_mask = slim(model, structure, masks=structure.masks(kept)).state_dict()
    assert all(torch.equal(v, by_mask[k]) for k, v in by_index.items())


def test_expand_refuses_what_was_not_slimmed_so() -> None:
    model = Plain()
    structure = analyze(model, EXAMPLE)
    state = slim(model, structure, {"0.0": [1, 5]}).state_dict()
    with pytest.raises(StructureError, match=r"slim '0\.0\.weight' has shape"):
        expand(structure, model, state, {"0.0": [1]})
    del state["6.bias"]
    with pytest.raises(StructureError, match=r"lacks '6\.bias'"):
        expand(structure, model, state, {"0.0": [1, 5]})


def test_verify_says_what_does_not_run() -> None:
    model = Plain()
    verdict = verify(model, model, (torch.zeros(1, 4, 8, 8),))
    assert verdict.kind == "wrong" and "doesn't run: RuntimeError" in verdict.reasons[0]
    verdict = verify(model, Residual(), (torch.zeros(1, 3, 16, 16),))
    assert verdict.kind == "wrong"


def test_groups_tell_their_producers_and_roles() -> None:
    structure = analyze(SqueezeExcite(), EXAMPLE)
    group = structure.group("stem.0")
    assert group.producers == ("stem.0", "excite") and group.num_channels == 8
    roles = {(m.parameter, m.dim): m.role for m in group.members}
    assert roles["stem.0.weight", 0] == "producer" and roles["head.weight", 1] == "consumer"
    assert roles["stem.1.running_mean", 0] == "norm" and roles["scale", 0] == "elementwise"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "fx"}, "form must be one of auto, module, graph, got 'fx'"),
        ({"heads": "all"}, "heads must be one of whole, dim, got 'all'"),
        ({"ignore": "conv"}, r"ignore must be a list of names, got 'conv'; write \['conv'\]"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, str], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        analyze(Plain().eval(), EXAMPLE, **options)


def test_kept_channels_are_indices() -> None:
    model = Plain().eval()
    structure = analyze(model, EXAMPLE)
    group = structure.groups[0]
    every = torch.ones(group.num_channels, dtype=torch.bool)
    for wrong in (4, every, [0.0, 1.0]):
        with pytest.raises(StructureError, match="kept channels are a list of indices, got "):
            slim(model, structure, {group.name: wrong})
    assert f"{len(structure.groups)} channel groups" in repr(structure)
    assert len(repr(structure.groups)) < 2000
