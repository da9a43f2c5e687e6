"""Masks of single layers, completed to whole groups: against brute force, and by hand."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from architectures import Residual, Shared, Transformer
from torch import Tensor, nn
from torch.nn.utils import prune

from raycompress.errors import StructureError
from raycompress.structure import analyze, masks_of, slim, verify

EXAMPLE = (torch.zeros(1, 3, 8, 8),)


def rows(shape: tuple[int, ...], gone: list[int], dim: int = 0) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    mask.index_fill_(dim, torch.tensor(gone, dtype=torch.int64), False)
    return mask


class Diamond(nn.Module):
    """Two layers whose sum is read by a third: one group of two producers, known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.a(x) + self.b(x)).relu())


@pytest.mark.parametrize("rule", ["intersection", "union"])
def test_every_pair_of_masks_agrees_with_brute_force(rule: str) -> None:
    structure = analyze(Diamond(), (torch.zeros(2, 3),))
    subsets = [list(s) for n in range(5) for s in itertools.combinations(range(4), n)]
    for of_a, of_b in itertools.product(subsets, subsets):
        masks = {"a.weight": rows((4, 3), of_a), "b.weight": rows((4, 3), of_b)}
        want = set(of_a) & set(of_b) if rule == "intersection" else set(of_a) | set(of_b)
        if len(want) == 4:
            want.discard(0)  # the first of those that would go stays
        done = structure.complete(masks, rule=rule)
        gone = sorted(want)
        expected = {
            "a.weight": rows((4, 3), gone),
            "a.bias": rows((4,), gone),
            "b.weight": rows((4, 3), gone),
            "c.weight": rows((2, 4), gone, 1),
        }
        if not gone:
            expected = {}
        assert done.masks.keys() == expected.keys()
        assert all(torch.equal(done.masks[k], v) for k, v in expected.items())
        again = structure.complete(done.masks, rule=rule)
        assert again.masks.keys() == done.masks.keys() and not again.changes and not again.dropped
        if gone:
            (change,) = done.changes  # a.bias had no mask: there is always something to report
            assert change.asked == {"a": tuple(of_a), "b": tuple(of_b)}
            assert change.removed == tuple(gone) and change.added == ("a.bias",)
            assert (change.note == "") == (set(of_a) == set(of_b) == want)


def test_layers_that_were_left_alone_keep_the_group_under_intersection() -> None:
    structure = analyze(Residual(), EXAMPLE)
    gone = {"b.weight": rows((8, 6, 3, 3), [1, 5])}
    done = structure.complete(gone)
    assert done.kept == {} and done.masks == {}
    (change,) = done.changes
    assert change.asked == {"stem.0": (), "b": (1, 5)} and change.removed == ()
    assert change.note == "layers disagree; intersection taken"
    done = structure.complete(gone, rule="union")
    assert done.kept["stem.0"].tolist() == [0, 2, 3, 4, 6, 7]
    assert done.changes[0].added == ("stem.0.weight", "stem.1.weight", "stem.1.bias", "b.bias")


def test_completed_masks_slim_to_the_model_that_they_mask() -> None:
    model = Residual().double().eval()
    structure = analyze(model, (torch.zeros(1, 3, 8, 8).double(),))
    done = structure.complete(
        {
            "stem.0.weight": rows((8, 3, 3, 3), [1, 2]),
            "b.weight": rows((8, 6, 3, 3), [1, 5]),
            "a.0.weight": rows((6, 8, 3, 3), [0, 3, 4]),
        }
    )
    assert {k: v.tolist() for k, v in done.kept.items()} == {
        "stem.0": [0, 2, 3, 4, 5, 6, 7],
        "a.0": [1, 2, 5],
    }
    masked = copy.deepcopy(model)
    for name, mask in done.masks.items():
        masked.get_parameter(name).data.mul_(mask)
    small = slim(model, structure, masks=done.masks)
    assert verify(masked, small, (torch.randn(3, 3, 8, 8).double(),)).max_error < 1e-12


def test_what_asks_for_nothing_is_dropped_with_the_reason() -> None:
    structure = analyze(Residual(), EXAMPLE)
    fine = torch.rand(6, 8, 3, 3) > 0.5
    done = structure.complete(
        {
            "a.0.weight": fine,
            "a.1.weight": rows((6,), [2]),
            "head.weight": rows((5, 10), [0]),
        }
    )
    assert done.masks == {} and done.changes == ()
    assert done.dropped == {
        "a.0.weight": "removes no output channel that goes",
        "a.1.weight": "removes no output channel that goes",
        "head.weight": "reaches the model's output",
    }


def test_zeros_outside_whole_channels_are_told() -> None:
    structure = analyze(Residual(), EXAMPLE)
    mask = rows((6, 8, 3, 3), [2])
    mask[4, :7] = False  # one kernel short of a whole channel
    done = structure.complete({"a.0.weight": mask})
    assert done.kept["a.0"].tolist() == [0, 1, 3, 4, 5]
    assert done.dropped == {"a.0.weight": "63 zeros outside the channels that it removes whole"}


def test_half_a_head_is_not_a_head() -> None:
    structure = analyze(Transformer(), EXAMPLE)
    (group,) = (g for g in structure.groups if "attention.qkv" in g.producers)
    member = next(m for m in group.members if m.parameter == "attention.qkv.weight")
    mask = rows((48, 16), [*member.indices[1], *member.indices[2][:5]])
    done = structure.complete({"attention.qkv.weight": mask})
    assert done.kept[group.name].tolist() == [0, 2, 3]
    assert done.dropped == {
        "attention.qkv.weight": f"{5 * 16} zeros outside the channels that it removes whole"
    }


def test_masks_of_norms_and_inputs_that_agree_are_no_news() -> None:
    structure = analyze(Residual(), EXAMPLE)
    whole = structure.masks({"a.0": [0, 1, 5]})
    done = structure.complete(whole)
    assert done.changes == () and done.dropped == {}
    assert done.kept["a.0"].tolist() == [0, 1, 5]


def test_limits_hold_for_completed_masks() -> None:
    structure = analyze(Residual(), EXAMPLE, round_to=4)
    done = structure.complete({"down.weight": rows((10, 8, 1, 1), [9, 3, 2])}, rule="union")
    assert done.kept["down"].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]  # 7 would be left; 2 stays
    assert done.changes[0].note == "8 channels must be kept"


def test_tied_weights_ask_once() -> None:
    structure = analyze(Shared(), EXAMPLE)
    masks = {
        "stem.0.weight": rows((8, 3, 3, 3), [4]),
        "same.weight": rows((8, 8, 3, 3), [4]),
    }
    assert structure.complete(masks).kept["stem.0"].tolist() == [0, 1, 2, 3, 5, 6, 7]


def test_nni_dicts_and_float_masks() -> None:
    structure = analyze(Residual(), EXAMPLE)
    nni = {
        "a.0": {"weight": rows((6, 8, 3, 3), [1, 2]).float(), "bias": None},
        "c": {"weight": torch.ones(10, 8, 3, 3), "bias": torch.ones(10)},
    }
    assert structure.complete(nni).kept["a.0"].tolist() == [0, 3, 4, 5]
    with pytest.raises(StructureError, match=r"mask for 'a.0.weight' must be a tensor, got list"):
        structure.complete({"a.0": {"weight": [1, 0]}})


def test_masks_of_torch_pruning_utilities() -> None:
    model = Residual()
    prune.ln_structured(model.a[0], "weight", 2, n=2, dim=0)
    masks = masks_of(model)
    assert list(masks) == ["a.0.weight"]
    prune.remove(model.a[0], "weight")
    structure = analyze(model, EXAMPLE)
    kept = structure.complete(masks).kept["a.0"].tolist()
    norms = model.a[0].weight.flatten(1).norm(dim=1)
    assert kept == torch.nonzero(norms).flatten().tolist() and len(kept) == 4


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(StructureError, match="'intersection' or 'union', got 'any'"):
        analyze(Residual(), EXAMPLE).complete({}, rule="any")
