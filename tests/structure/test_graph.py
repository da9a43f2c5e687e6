"""Graph form: models whose code has sizes written into it become smaller, and compute the same."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hardcoded import (
    HARDCODED,
    Created,
    Folded,
    Halves,
    Heads,
    LayerNormed,
    Recurrent,
    Shuffled,
    Splits,
    Tied,
    Views,
)
from test_slim import half, masked, randomised
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raycompress.errors import StructureError
from raycompress.structure import Structure, analyze, expand, slim, verify

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")  # export of an LSTM


@functools.cache
def analysed(kind: type[nn.Module]) -> tuple[nn.Module, Structure]:
    model = randomised(kind())
    return model, analyze(model, inputs(kind, 2), form="graph")


def inputs(kind: type[nn.Module], batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *HARDCODED[kind], generator=generator).double()


@pytest.fixture(params=HARDCODED, ids=lambda c: c.__name__)
def kind(request: pytest.FixtureRequest) -> type[nn.Module]:
    chosen: type[nn.Module] = request.param
    return chosen


def test_slim_equals_masked_at_other_batch_sizes_and_cost_equals_counting(
    kind: type[nn.Module],
) -> None:
    model, structure = analysed(kind)
    assert structure.form == "graph" and not structure.unknown_ops
    for seed in range(3):
        kept = half(structure, seed)
        small = slim(model, structure, kept)
        reference = masked(model, structure.masks(kept))
        for batch in (1, 5):
            verdict = verify(reference, small, inputs(kind, batch), structure=structure, kept=kept)
            error = verdict.max_error if verdict.kind == "exact" else verdict.reference_error
            assert verdict.kind != "wrong" and error is not None and error < 1e-10, verdict
            assert verdict.kind == "exact" or kind is LayerNormed, verdict
        cost = structure.cost({k: len(v) for k, v in kept.items()})
        assert cost.params == sum(p.numel() for p in small.parameters())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            small(inputs(kind, 5))
        assert 2 * cost.macs * 5 == flops.get_total_flops()


def test_unequal_parts_of_a_split() -> None:
    model, structure = analysed(Halves)
    assert [g.num_channels for g in structure.groups] == [16, 16]
    kept = {g.name: [1, 5, 11][: 3 - i] for i, g in enumerate(structure.groups)}
    small = slim(model, structure, kept)
    assert small.get_parameter("b.weight").shape == (4, 3)
    assert small.get_parameter("c.weight").shape == (4, 2)
    assert small.get_parameter("a.weight").shape == (5, 6)
    reference = masked(model, structure.masks(kept))
    assert verify(reference, small, inputs(Halves, 7)).max_error < 1e-10
    equal = analyze(model, inputs(Halves, 2), form="module")
    assert equal.form == "module" and len(equal.groups) < 2


class Named(nn.Module):
    """Keyword arguments in another order than the signature's, and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, list[Tensor]]:
        x = self.a(x).view(-1, 3, 4) * mask[:, :, None]
        return {"out": [self.b(x.reshape(-1, 12)) * scale, mask]}


def test_keyword_arguments_and_nested_results() -> None:
    model = randomised(Named())
    given = {"mask": torch.rand(2, 3).double(), "scale": 2.0, "x": torch.rand(2, 6).double()}
    structure = analyze(model, given, form="graph")
    kept = half(structure)
    small = slim(model, structure, kept)
    other = {"x": torch.rand(5, 6).double(), "mask": torch.rand(5, 3).double(), "scale": 2.0}
    assert structure.cost().params == 84 + 52
    reference = masked(model, structure.masks(kept))
    assert verify(reference, small, other, structure=structure, kept=kept).max_error < 1e-10


def test_a_slim_graph_can_be_analysed_again() -> None:
    model, structure = analysed(Folded)
    kept = half(structure)
    small = slim(model, structure, kept)
    again = analyze(small, inputs(Folded, 2), form="graph")
    assert again.cost() == structure.cost({k: len(v) for k, v in kept.items()})
    assert [g.num_channels for g in again.groups] == [len(v) for v in kept.values()]


def test_positions_of_heads_keep_the_dense_scale() -> None:
    model = randomised(Heads())
    structure = analyze(model, inputs(Heads, 2), form="graph", heads="dim")
    kept = half(structure)
    small = slim(model, structure, kept)
    reference = masked(model, structure.masks(kept))
    assert small.get_parameter("qkv.weight").shape[0] == 36
    assert verify(reference, small, inputs(Heads, 3)).max_error < 1e-10


def test_names_are_those_of_the_dense_model_and_tied_parameters_stay_tied() -> None:
    model, structure = analysed(Tied)
    group = structure.group("a")
    assert [m.parameter for m in group.members] == [
        "a.weight", "a.bias", "b.weight", "c.bias", "head.weight", "scale",
    ]  # fmt: skip
    small = slim(model, structure, {"a": [0, 3]})
    for candidate in (small, copy.deepcopy(small)):
        assert candidate.state_dict().keys() == model.state_dict().keys()
        named = dict(candidate.named_parameters(remove_duplicate=False))
        assert named["a.weight"] is named["c.weight"]
        assert "scale" in dict(candidate.named_buffers())
    assert structure.untouched == ("unused.weight", "unused.bias")


class Deep(nn.Module):
    """A tied weight whose first name lies deeper than its second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 12))
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.body[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).view(-1, 7, 12).relu())


def test_parameters_come_in_the_order_of_the_dense_model() -> None:
    model = Deep().double().eval()
    structure = analyze(model, torch.zeros(2, 7, dtype=torch.long), form="graph")
    small = slim(model, structure, {})
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "body.0.weight"
    for made in (small, copy.deepcopy(small)):
        assert [name for name, _ in made.named_parameters()] == names


def test_structure_is_plain_data_for_any_copy_of_the_model() -> None:
    _, structure = analysed(Views)
    again = pickle.loads(pickle.dumps(structure))
    other = randomised(Views(), seed=7)
    kept = half(again)
    small = slim(other, again, kept)
    reference = masked(other, again.masks(kept))
    assert verify(reference, small, inputs(Views, 3)).max_error < 1e-10
    with pytest.raises(StructureError, match="isn't the one analysed"):
        slim(randomised(Heads()), again, kept)


def test_slim_weights_go_back_into_the_dense_model() -> None:
    model, structure = analysed(Heads)
    kept = half(structure)
    small = slim(model, structure, kept)
    dense = copy.deepcopy(model)
    dense.load_state_dict(expand(structure, model, small.state_dict(), kept))
    assert verify(dense, small, inputs(Heads, 3)).max_error < 1e-10


def test_modes_and_training() -> None:
    model = randomised(Views())
    structure = analyze(model.train(), inputs(Views, 2), form="graph")
    assert model.training
    small = slim(model, structure, half(structure))
    x = inputs(Views, 6)
    assert not small.training and torch.equal(small(x), small(x))
    small = copy.deepcopy(small).train()
    assert small.training and not torch.equal(small(x), small(x))  # dropout is on
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())
    optimizer.step()
    after = small.state_dict()
    assert not torch.equal(before["bn.running_mean"], after["bn.running_mean"])
    assert not torch.equal(before["a.weight"], after["a.weight"])
    small.eval()
    mean = small.get_buffer("bn.running_mean").clone()
    assert torch.equal(small(x), small(x)) and torch.equal(
        small.get_buffer("bn.running_mean"), mean
    )


def test_batch_norm_uses_the_batch_in_train_mode_as_a_module_does() -> None:
    model = randomised(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    x = torch.randn(9, 6).double()
    kept = {"0": [1, 2, 6]}
    module = slim(model, analyze(model, x, form="module"), kept).train()
    graph = slim(model, analyze(model, x, form="graph"), kept).train()
    for _ in range(2):
        assert torch.allclose(module(x), graph(x), atol=1e-12, rtol=0)
    for name, buffer in graph.named_buffers():
        if "tracked" not in name:
            assert torch.allclose(buffer, module.get_buffer(name), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [Recurrent, Created], ids=lambda c: c.__name__)
def test_what_the_graph_creates_follows_type_and_device(kind: type[nn.Module]) -> None:
    model, structure = analysed(kind)
    small = slim(model, structure, half(structure))
    x = inputs(kind, 3)
    expected = small(x)
    single = copy.deepcopy(small).float()
    assert torch.allclose(single(x.float()), expected.float(), atol=1e-4)
    assert torch.allclose(single.double()(x), expected, atol=1e-4)
    assert small.to("meta")(x.to("meta")).shape == expected.shape


_FRESH = """
import sys, torch
for name in sys.argv[1:]:
    saved = torch.load(name + ".data")
    out = torch.export.load(name + ".pt2").module()(saved["x"])
    assert torch.equal(out, saved["y"]), (name, (out - saved["y"]).abs().max())
assert not any(name.startswith("raycompress") for name in sys.modules)
"""


def test_saved_programs_give_equal_outputs_in_a_process_without_the_library(
    tmp_path: Path,
) -> None:
    kinds = (Splits, Folded, Shuffled, Created, Recurrent, Tied)
    for kind in kinds:
        model, structure = analysed(kind)
        small = slim(model, structure, half(structure))
        x = inputs(kind, 4)
        dynamic = ({0: torch.export.Dim.AUTO},)
        exported = torch.export.export(small, (inputs(kind, 2),), dynamic_shapes=dynamic)
        torch.export.save(exported, tmp_path / f"{kind.__name__}.pt2")
        y = exported.module()(x)
        assert torch.allclose(y, small(x), atol=1e-12, rtol=0)
        torch.save({"x": x, "y": y}, tmp_path / f"{kind.__name__}.data")
    command = [sys.executable, "-c", _FRESH, *(k.__name__ for k in kinds)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class Branching(nn.Module):
    """Can't be exported: its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if float(x.sum()) > 1e9:
            return x[:, :2]
        return self.b(x.view(-1, 3, 4)).sum(1)


class OneBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(2, 12))


class Cast(OneBatch):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(self.a(x).view(-1, 12))


class Conditional(OneBatch):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,))
        return self.b(self.a(x).view(-1, 12))


def test_what_cannot_be_exported_is_refused_or_stays_in_module_form() -> None:
    model, x = randomised(Branching()), torch.randn(2, 6).double()
    with pytest.raises(StructureError, match="can't be exported"):
        analyze(model, x, form="graph")
    assert analyze(model, x).form == "module"
    for kind, problem in (
        (OneBatch, "one batch size only"),
        (Cast, "autocast"),
        (Conditional, "branches or loops"),
    ):
        with pytest.raises(StructureError, match=problem):
            analyze(randomised(kind()), x, form="graph")


def test_automatic_form() -> None:
    for kind in (Halves, Heads, Created):
        assert analyze(analysed(kind)[0], inputs(kind, 2)).form == "graph"
    assert analyze(randomised(Recurrent()), inputs(Recurrent, 2)).form == "module"
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    assert analyze(plain, torch.zeros(2, 6)).form == "module"


def test_protection_and_multiples_hold_in_graph_form() -> None:
    model = randomised(Views())
    structure = analyze(model, inputs(Views, 2), form="graph", ignore=("a",), round_to=5)
    assert [g.name for g in structure.groups] == ["b"]
    assert structure.group("b").multiple == 5
    example = inputs(Views, 1)  # export takes a batch of one for a constant: it is doubled
    assert analyze(model, example, form="graph").cost() == structure.cost()
