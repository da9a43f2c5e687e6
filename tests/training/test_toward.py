"""The proximal gradient, and norm scales that shrink."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from raycompress.errors import TaskError
from raycompress.method import TrainingRun
from raycompress.structure import analyze
from raycompress.testing import ToyTask
from raycompress.training import ScaleSparsity, Toward
from raycompress.weights import Weights


def run_of(model: nn.Module, stored: dict[str, Weights] | None = None) -> TrainingRun:
    """A run without a host."""
    task = ToyTask()
    return TrainingRun(
        model=model,
        task=task,
        structure=analyze(task.build_model().eval(), task.example_inputs()),
        masks={},
        device=torch.device("cpu"),
        weights=lambda digest: (stored or {})[digest],
        build=lambda digest: copy.deepcopy(model),
    )


def test_gradient_of_the_pull_by_hand():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0]])
    stored = {"t": Weights({"weight": torch.tensor([[0.5, 0.0]])}, {})}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.tensor([[0.25, 0.25]])
    with Toward(target="t", rho=0.5).around(run_of(model, stored)):
        optimizer.step()
    # g = [0.25, 0.25] + 0.5 * ([1, -2] - [0.5, 0]) = [0.5, -0.75]
    assert torch.equal(model.weight.data, torch.tensor([[0.5, -1.25]]))


def test_gradient_of_the_pull_is_autograds():
    model = nn.Linear(3, 4)
    target = torch.randn(4, 3)
    loss = 0.7 / 2 * (model.weight - target).square().sum()
    loss.backward()
    expected = model.weight.grad.clone()
    model.weight.grad.zero_()
    seen = []
    optimizer = torch.optim.SGD([model.weight], lr=0.0)
    stored = {"t": Weights({"weight": target}, {})}
    with Toward(target="t", rho=0.7).around(run_of(model, stored)):
        optimizer.step()
        seen.append(model.weight.grad.clone())
    assert torch.allclose(seen[0], expected)


def test_scale_subgradient_is_the_sign_and_zero_at_zero():
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3))
    model[1].weight.data = torch.tensor([2.0, -0.5, 0.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(model.state_dict())
    with ScaleSparsity(strength=0.125).around(run_of(model)):
        optimizer.step()
    assert model[1].weight.tolist() == [1.875, -0.375, 0.0]
    for name, tensor in model.state_dict().items():
        if name != "1.weight":  # neither shifts nor other layers
            assert torch.equal(tensor, before[name]), name


def test_scales_end_smaller_than_without():
    task = ToyTask()

    def scales(strength: float) -> torch.Tensor:
        model = task.build_model()
        run = run_of(model)
        if strength:
            with ScaleSparsity(strength=strength).around(run):
                task.train(model, epochs=8, seed=0)
        else:
            task.train(model, epochs=8, seed=0)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        return torch.cat([norm.weight.detach() for norm in norms])

    assert scales(0.2).abs().mean() < 0.6 * scales(0.0).abs().mean()


def test_model_without_norms_is_refused():
    with pytest.raises(TaskError, match="needs a model with BatchNorm scales"):
        with ScaleSparsity().around(run_of(nn.Linear(2, 2))):
            pass
