from typing import Any, cast

import pytest
import torch
from torch import nn

from raycompress.errors import ConfigError, TaskError
from raycompress.method import TrainingRun
from raycompress.quantization.bnn import BNN, ClipWeights, SignInput, binarize
from raycompress.quantization.quantizer import Bits
from raycompress.structure import Structure
from raycompress.task import Task
from raycompress.testing import ToyNet, ToyTask


def test_signs_of_zeros_are_one_and_nan_stays():
    x = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0])
    assert binarize(x).tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    assert binarize(torch.tensor([float("nan")])).isnan().all()


def test_the_gradient_is_zero_exactly_where_x_is_beyond_one():
    x = torch.tensor([-1.5, -1.0, -0.3, 0.0, 1.0, 1.0001], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    binarize(x).backward(upstream)
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


def _run(model: nn.Module) -> TrainingRun:
    def none(digest: str) -> Any:
        raise AssertionError(digest)

    task, structure = cast(Task, None), cast(Structure, None)
    return TrainingRun(model, task, structure, {}, torch.device("cpu"), none, none)


def test_only_binary_weights_are_clipped_and_they_stay_real():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-3, 3, parameter.numel()).view_as(parameter))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    others = [p for name, p in model.named_parameters() if name != "0.weight"]
    with ClipWeights(parameters=("0.weight",)).around(_run(model)):
        assert model[0].weight.abs().max() == 1  # already when training starts
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, -0.25)
            optimizer.step()
            assert model[0].weight.abs().max() == 1
    assert model[0].weight.flatten().tolist() == pytest.approx([-0.5, -0.5, -0.1, 1, 1, 1])
    for parameter in others:
        expected = torch.linspace(-3, 3, parameter.numel()).view_as(parameter) + 0.5
        assert torch.allclose(parameter.detach(), expected)


def test_inputs_without_a_negative_are_refused_with_what_to_do():
    layer = SignInput("features.3")
    assert layer.eval()(torch.ones(2)).tolist() == [1.0, 1.0]
    with pytest.raises(TaskError, match=r"inputs of 'features.3' are never negative.*Hardtanh"):
        layer.train()(torch.rand(4, 3))
    layer(torch.tensor([1.0, -1.0]))
    layer(torch.rand(4))  # one batch tells


def test_flipping_all_weights_of_a_neuron_flips_what_comes_before_its_norm():
    torch.manual_seed(0)
    x, w = binarize(torch.randn(9, 30)), torch.randn(4, 30)
    flipped = w.clone()
    flipped[2] = -w[2]
    out, other = x @ binarize(w).T, x @ binarize(flipped).T
    assert torch.equal(other[:, 2], -out[:, 2])
    assert torch.equal(other[:, [0, 1, 3]], out[:, [0, 1, 3]])


class BinaryToy(ToyTask):
    """The toy task's net in the order that binary layers want: layer, norm, Hardtanh."""

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.Sequential(
                nn.Conv2d(2, 32, 3, padding=1),
                nn.BatchNorm2d(32),
                nn.Hardtanh(),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.BatchNorm2d(32),
                nn.Hardtanh(),
                nn.Flatten(),
                nn.Linear(32 * 36, 3),
            )

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=lr)


def test_policies_of_the_first_and_the_last_layer():
    model = BinaryToy().build_model()
    both = Bits(weight=1, input=1)
    assert BNN().choose(model) == {"3": both}
    assert BNN(first="weights").choose(model) == {"0": Bits(weight=1), "3": both}
    assert BNN(last="binary").choose(model) == {"3": both, "7": both}
    with pytest.raises(ConfigError, match="first must be float or weights, got 'binary'"):
        BNN(first=cast(Any, "binary"))
    with pytest.raises(ConfigError, match=r"BNN has one bit.*: 3: Bits\(weight=2"):
        BNN().prepare(model, {"3": Bits(weight=2)})


def test_a_binary_network_learns_with_real_weights_inside_of_one():
    task = BinaryToy()
    model = task.build_model()
    quantizer = BNN(first="weights")
    quantizer.prepare(model, quantizer.choose(model))
    data = task.dataset("test")
    with ClipWeights(parameters=("0.weight", "3.weight")).around(_run(model)):
        assert quantizer.methods(model) == (ClipWeights(parameters=("0.weight", "3.weight")),)
        task.train(model, epochs=6, lr=0.01)
    for layer in (model[0], model[3]):
        assert layer.weight.abs().max() <= 1 and len(layer.weight.unique()) > 100
        assert layer.quantized_weight().unique().tolist() == [-1.0, 1.0]
    with torch.no_grad():
        hits = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
    assert hits > 0.8


def test_relu_before_a_binary_layer_is_an_error_that_names_it():
    task = ToyTask()
    model = task.build_model()
    quantizer = BNN()
    quantizer.prepare(model, quantizer.choose(ToyNet()))
    with pytest.raises(TaskError, match="'conv2' are never negative"):
        task.train(model, epochs=1)
