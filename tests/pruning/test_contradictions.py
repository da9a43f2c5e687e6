"""What targets, budgets and layers can't do together is refused, never done by half."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raycompress.errors import BudgetError, ConfigError, EvaluationError
from raycompress.pruning import (
    ADMM,
    AGP,
    FineGrained,
    Iterative,
    L1Filter,
    Level,
    LotteryTicket,
    MovementPruning,
    SoftFilter,
    Wanda,
)
from raycompress.search import run_search
from raycompress.targets import Target, config_list
from raycompress.testing import ToyTask, toy_problem

POOL = (Target(op_types=("Conv2d",), global_group_id="x"),)
CAPPED = (Target(op_types=("default",), global_group_id="x", max_sparsity_per_layer=0.3),)


@pytest.mark.parametrize(
    ("pruner", "budget"),
    [
        (L1Filter(), {"macs": "50%"}),
        (Iterative(rounds=1), {"macs": "50%"}),
        (SoftFilter(intervals=1), {"macs": "50%"}),
        (AGP(end=1), {"params": "50%"}),
        (Level(), {"params": "30%"}),
    ],
)
@pytest.mark.parametrize("targets", [POOL, CAPPED])
def test_layers_that_compete_and_a_budget(tmp_path, pruner, budget, targets):
    """One share for all meets the budget; units that compete would go past it."""
    problem, _ = toy_problem(str(tmp_path), budget)
    with pytest.raises(ConfigError, match=r"'conv1'.* compete .* can't both decide"):
        pruner.check(replace(problem, targets=targets))


@pytest.mark.parametrize(
    ("pruner", "budget"),
    [
        (L1Filter(scope="global"), {"macs": "30%"}),
        (Level(scope="global"), {"params": "30%"}),
    ],
)
def test_caps_that_keep_a_budget_from_being_met(tmp_path, pruner, budget):
    problem, _ = toy_problem(str(tmp_path), budget)
    with pytest.raises(BudgetError, match="max_sparsity_per_layer of targets keeps too many"):
        pruner.check(replace(problem, targets=CAPPED))
    free = replace(problem, targets=(replace(CAPPED[0], max_sparsity_per_layer=None),))
    pruner.check(free)


def test_caps_that_keep_a_pool_from_its_sparsity(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    capped = Target(op_types=("default",), total_sparsity=0.9, max_sparsity_per_layer=0.3)
    with pytest.raises(ConfigError, match=r"at most 0.299 of the units .* and 0.9 is asked"):
        Level().check(replace(problem, targets=(capped,)))
    fits = replace(problem, targets=(replace(capped, total_sparsity=0.25),))
    masks = executor.host.masks(run_search(Level().search(fits), executor))
    sizes = [mask.numel() for mask in masks.values()]
    assert sum(int((~m).sum()) for m in masks.values()) == int(0.25 * sum(sizes))
    assert all(int((~m).sum()) <= 0.3 * m.numel() for m in masks.values())


def test_a_pattern_and_another_sparsity(tmp_path):
    problem, _ = toy_problem(str(tmp_path))
    for sparsity, fails in ((0.75, True), (0.5, False)):
        targets = (Target(op_types=("Linear",), sparsity=sparsity),)
        pruner = FineGrained(pattern="2:4")
        if not fails:
            pruner.check(replace(problem, targets=targets))
            continue
        with pytest.raises(ConfigError, match=r"'2:4' fixes .* at 0.5, .* ask 0.75 of 'fc.weight'"):
            pruner.check(replace(problem, targets=targets))


def test_keys_that_mean_nothing_are_refused_in_process_too():
    model = ToyTask().build_model().eval()
    for pruner, entry, key in (
        (L1Filter(sparsity=0.5), {"start_epoch": 3}, "start_epoch"),
        (ADMM(sparsity=0.5), {"total_sparsity": 0.5}, "total_sparsity"),
    ):
        targets = config_list([{"op_types": ["Conv2d"], **entry}])
        with pytest.raises(ConfigError, match=f"targets.{key} is nothing that"):
            pruner.prune(model, ToyTask(), targets)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"op_types": "Conv2d"}, "targets.op_types must be a list of names, got 'Conv2d'"),
        ({"op_types": ["Conv2d"], "sparsity": "0.5"}, r"must be a number in \[0, 1\), got '0.5'"),
    ],
)
def test_entries_of_another_type(entry, message):
    with pytest.raises(ConfigError, match=message):
        config_list([entry])


@pytest.mark.parametrize("make", [ADMM, AGP, Iterative, SoftFilter, L1Filter])
def test_kept_counts_that_cant_be(make):
    for key in ("round_to", "min_kept"):
        with pytest.raises(ConfigError, match=f"{make.__name__}.{key} must be at least 1, got 0"):
            make(**{key: 0})


@pytest.mark.parametrize("pruner", [ADMM(sparsity=0.5), LotteryTicket(sparsity=0.5, reinit=True)])
def test_a_check_leaves_no_files(tmp_path, pruner):
    problem, _ = toy_problem(str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    pruner.check(problem)
    assert sorted(tmp_path.rglob("*")) == before


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(72, 72), nn.Linear(72, 72), nn.Linear(72, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        hidden = torch.relu(self.b(torch.relu(self.a(x.flatten(1)))))
        logits: Tensor = self.fc(hidden)
        return logits


class Attention(nn.Module):
    """torch's own, which uses the weight of `out_proj` and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(36, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(x.flatten(2))
        logits: Tensor = self.fc(self.attention(x, x, x)[0].mean(1))
        return logits


class Computed(nn.Module):
    """A weight that is computed, beside a norm of three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((2, 6, 6))
        self.fc = nn.Linear(72, 3)
        self.other = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.other(self.fc(self.norm(x).flatten(1)))
        return logits


class OwnModel(ToyTask):
    """The toy data with another model."""

    def __init__(self, make: type[nn.Module]) -> None:
        super().__init__()
        self.make = make

    def build_model(self) -> nn.Module:
        """The same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()


@pytest.mark.parametrize(
    "pruner",
    [
        Level(sparsity=0.5),
        Wanda(sparsity=0.5),
        AGP(final_sparsity=0.5, end=1),
        LotteryTicket(sparsity=0.5, rounds=1),
        ADMM(sparsity=0.5, iterations=1),
        MovementPruning(sparsity=0.5, epochs=1),
    ],
)
def test_tied_weights_are_pruned_once(pruner):
    task = OwnModel(Tied)
    masks = pruner.prune(task.build_model().eval(), task)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {
        "a.weight": 72 * 72 // 2,
        "fc.weight": 72 * 3 // 2,
    }


def test_half_of_tied_layers_cant_be_pruned():
    task = OwnModel(Tied)
    targets = (Target(op_names=("a",), sparsity=0.5),)
    with pytest.raises(ConfigError, match="'a' and 'b' share one weight"):
        Level().prune(task.build_model().eval(), task, targets)


def test_wanda_refuses_layers_that_it_never_saw():
    task = OwnModel(Attention)
    model = task.build_model().eval()
    with pytest.raises(EvaluationError, match=r"'attention.out_proj' was never called"):
        Wanda(sparsity=0.5).prune(model, task)
    targets = (
        Target(op_types=("default",), sparsity=0.5),
        Target(op_names=("attention.out_proj",), exclude=True),
    )
    assert set(Wanda().prune(model, task, targets)) == {"embed.weight", "fc.weight"}


def test_computed_weights_and_norms_are_no_layers():
    task = OwnModel(Computed)
    model = task.build_model().eval()
    with pytest.raises(ConfigError, match=r"weight of 'other' is no parameter, but computed"):
        Level(sparsity=0.5).prune(model, task)
    targets = (
        Target(op_types=("default",), sparsity=0.5),
        Target(op_names=("other",), exclude=True),
    )
    assert set(Level().prune(model, task, targets)) == {"fc.weight"}


def test_a_model_without_channels_to_prune():
    task = OwnModel(Tied)
    with pytest.raises(ConfigError, match="L1Filter: the model has no channel group that can be"):
        L1Filter(sparsity=0.5).prune(task.build_model().eval(), task)
