"""Models under torch.compile: pruned, held, slimmed and evaluated as others are."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from raycompress.masks import hold, masked_copy
from raycompress.pruning import ActivationAPoZRank, L1Filter, LotteryTicket, TaylorFO
from raycompress.structure import analyze, slim, verify
from raycompress.testing import ToyTask


class Compiled(ToyTask):
    """Builds its model compiled; the backend runs what was traced as it is."""

    def build_model(self) -> nn.Module:
        """The toy model behind `torch.compile`."""
        compiled: Any = torch.compile(super().build_model(), backend="eager")
        return compiled


class CompilesToTrain(ToyTask):
    """Compiles in its training loop, and leaves the model itself as it is."""

    def train(self, model: nn.Module, **options: Any) -> None:
        """The default loop on the compiled model."""
        compiled: Any = torch.compile(model, backend="eager")
        super().train(compiled, **options)
        model.eval()


@pytest.mark.parametrize(
    "pruner",
    [L1Filter(sparsity=0.5), ActivationAPoZRank(sparsity=0.5), TaylorFO(sparsity=0.5)],
    ids=lambda pruner: type(pruner).__name__,
)
def test_masks_are_those_of_the_plain_model(pruner):
    plain = pruner.prune(ToyTask().build_model().eval(), ToyTask())
    compiled = pruner.prune(Compiled().build_model().eval(), Compiled())
    assert {f"_orig_mod.{name}" for name in plain} == set(compiled)
    for name, mask in plain.items():
        assert torch.equal(mask, compiled[f"_orig_mod.{name}"]), name


def test_a_slim_compiled_model_computes_what_the_masked_one_does():
    task = Compiled()
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs())
    kept = {"_orig_mod.conv1": torch.arange(4), "_orig_mod.conv3": torch.arange(5)}
    small = slim(model, structure, kept)
    verdict = verify(
        masked_copy(model, structure.masks(kept)), small, task.example_inputs(), structure=structure
    )
    assert verdict.kind == "exact", verdict
    assert small.get_parameter("_orig_mod.conv3.weight").shape == (5, 4, 3, 3)


@pytest.mark.parametrize("task", [Compiled(), CompilesToTrain()], ids=lambda t: type(t).__name__)
def test_masks_hold_while_a_compiled_model_trains(task):
    model = task.build_model()
    name = next(n for n, _ in model.named_parameters() if n.endswith("conv3.weight"))
    weight = model.get_parameter(name)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    before = weight.detach().clone()
    with hold(model, {name: mask}):
        task.train(model, epochs=2)
    assert (weight[~mask] == 0).all() and not torch.equal(weight[mask], before[mask])


def test_a_ticket_of_a_compiled_model():
    pruner = LotteryTicket(sparsity=0.5, rounds=1)
    plain = pruner.prune(ToyTask().build_model().eval(), ToyTask())
    masks = pruner.prune(ToyTask().build_model().eval(), CompilesToTrain())
    assert {n: int(m.sum()) for n, m in masks.items()} == {
        n: int(m.sum()) for n, m in plain.items()
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
def test_a_slim_model_compiles_to_machine_code():
    task = ToyTask()
    model = task.build_model().eval()
    (x,) = task.example_inputs()
    structure = analyze(model, (x,))
    kept = {"conv1": torch.arange(4), "conv3": torch.arange(8)}
    compiled: Any = torch.compile(slim(model, structure, kept))
    with torch.no_grad():
        expected = masked_copy(model, structure.masks(kept))(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
