"""Training loops as users write them: scaled gradients, several optimizers, accumulation."""

from __future__ import annotations

import pytest
import torch
from test_toward import run_of
from torch import nn

from raycompress.errors import TaskError
from raycompress.masks import hold
from raycompress.method import TrainingMethod
from raycompress.steps import after_step, before_step
from raycompress.training import Movement, ScaleSparsity, Toward
from raycompress.weights import Weights

OPTIMIZERS = {
    "SGD": lambda parameters, **options: torch.optim.SGD(parameters, lr=0.5, **options),
    "Adam": lambda parameters, **options: torch.optim.Adam(parameters, lr=0.5, **options),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_gradients_are_unscaled_before_methods_see_them(name, fused):
    """A fused optimizer divides by the scale itself; the pull would be 1024 times too weak."""
    weights = []
    for scaled in (False, True):
        model = nn.Linear(2, 1, bias=False)
        model.weight.data = torch.tensor([[1.0, -2.0]])
        optimizer = OPTIMIZERS[name](model.parameters(), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        stored = {"t": Weights({"weight": torch.zeros(1, 2)}, {})}
        seen = []
        with (
            Toward(target="t", rho=0.25).around(run_of(model, stored)),
            before_step(model, lambda _, m=model, s=seen: s.append(m.weight.grad.clone())),
        ):
            loss = (model.weight * torch.tensor([[0.5, 0.125]])).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        # g + rho * W
        assert torch.equal(seen[0], torch.tensor([[0.5 + 0.25, 0.125 - 0.5]]))
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_changes_nothing(fused):
    model = nn.Linear(2, 1, bias=False)
    run = run_of(model)
    run.num_steps = 10
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    calls = []
    with (
        Movement(parameters=("weight",), sparsity=(0.5,), warm_up=0.0).around(run),
        after_step(model, calls.append),
    ):
        for value in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale((model.weight * value).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if value != 1.0:
                assert torch.equal(model.weight, before) and not calls
    assert torch.isfinite(run.extra["weight.score"]).all() and len(calls) == 1


def test_a_closure_is_refused():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    stored = {"t": Weights({"weight": torch.zeros(1, 2)}, {})}
    for options in ((closure,), ()):
        with (
            Toward(target="t", rho=1.0).around(run_of(model, stored)),
            pytest.raises(TaskError, match=r"LBFGS.step is called with a closure"),
        ):
            optimizer.step(*options) if options else optimizer.step(closure=closure)
    optimizer.step(closure)  # hooks are gone


def _methods() -> dict[str, tuple[TrainingMethod, dict[str, Weights]]]:
    target = {"t": Weights({"0.weight": torch.zeros(4, 3), "2.weight": torch.zeros(2, 4)}, {})}
    movement = Movement(
        parameters=("0.weight", "2.weight"), sparsity=(0.5, 0.5), warm_up=0.2, cool_down=0.2
    )
    return {
        "Toward": (Toward(target="t", rho=0.5), target),
        "ScaleSparsity": (ScaleSparsity(strength=0.25), {}),
        "Movement": (movement, {}),
    }


@pytest.mark.parametrize("name", ["Toward", "ScaleSparsity", "Movement"])
def test_an_optimizer_for_each_layer_is_one_for_all(name):
    """Each step counts for what that optimizer updates, and for nothing else."""
    results = []
    for several in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        method, stored = _methods()[name]
        run = run_of(model, stored)
        run.num_steps = 6
        parts = [list(layer.parameters()) for layer in model]
        optimizers = [
            torch.optim.SGD(part, lr=0.1, momentum=0.9)
            for part in (parts if several else [[p for part in parts for p in part]])
        ]
        with method.around(run):
            for run.step in range(6):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                x = torch.randn(8, 3, generator=torch.Generator().manual_seed(run.step))
                model(x).square().sum().backward()
                for optimizer in optimizers:
                    optimizer.step()
        results.append({**model.state_dict(), **run.extra})
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_accumulated_gradients_reach_the_final_sparsity():
    """The schedule goes by the loop's own progress, not by how often the optimizer steps."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    run = run_of(model)
    run.num_steps = 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Movement(parameters=("weight",), sparsity=(0.75,), cool_down=0.25).around(run):
        for run.step in range(12):
            (model(torch.randn(8, 6)).square().mean() / 4).backward()
            if run.step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    assert int((model.weight != 0).sum()) == 6


def test_a_frozen_weight_cant_be_scored():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    run = run_of(model)
    run.num_steps = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = ("0.weight", "1.weight")
    with pytest.raises(TaskError, match=r"'0.weight' never had a gradient"):
        with Movement(parameters=names, sparsity=(0.5, 0.5)).around(run):
            model(torch.randn(8, 3)).sum().backward()
            optimizer.step()


def test_soft_scores_begin_kept_and_go_where_they_fell():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.ones(1, 3)
    run = run_of(model)
    run.num_steps = 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    movement = Movement(
        parameters=("weight",), soft=True, score_lr=1.0, warm_up=0.5, cool_down=0.2, penalty=0.3
    )
    with movement.around(run):
        for run.step in range(10):
            model.weight.grad = torch.tensor([[0.5, -0.5, 0.0]])
            optimizer.step()
            if run.step < 5:
                assert (model.weight != 0).all()  # nothing goes in the warm-up
            if run.step == 0:
                # S = -(g * W + 0.3 * s(0) * (1 - s(0)) / 3), s(0) = 1/2; kept in run.extra later
                first = torch.tensor([[-0.525, 0.475, -0.025]])
    # In the end sigmoid(S) > 1/2 stays: what gained score; without a gradient the penalty decides.
    assert (model.weight != 0).tolist() == [[False, True, False]]
    scores = run.extra["weight.score"]
    assert scores[0, 0] < first[0, 0] and scores[0, 1] > first[0, 1] and scores[0, 2] < 0


def test_tied_weights_are_held_by_all_their_masks():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model = Tied()
    masks = {name: torch.ones(4, 4, dtype=torch.bool) for name in ("a.weight", "b.weight")}
    masks["a.weight"][0, 0] = masks["b.weight"][1, 1] = False
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with hold(model, masks):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()
    assert model.a.weight[0, 0] == 0 and model.a.weight[1, 1] == 0
    assert int((model.a.weight == 0).sum()) == 2
