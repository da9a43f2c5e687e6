import math
from typing import Any, cast

import pytest
import torch
from torch import nn

from raycompress.errors import ConfigError
from raycompress.method import TrainingRun
from raycompress.quantization.lsq import (
    LSQ,
    LearnedStep,
    StepSizes,
    first_step_size,
    quantize_with_step,
)
from raycompress.quantization.quantizer import Bits
from raycompress.structure import Structure
from raycompress.task import Task
from raycompress.testing import ToyNet, ToyTask


def test_values_by_hand():
    v = torch.tensor([-3.0, -0.76, -0.24, 0.0, 0.26, 0.74, 5.0])
    # Two bits with sign, s = 0.5: v / s = -6, -1.52, -0.48, 0, 0.52, 1.48, 10 in [-2, 1].
    out = quantize_with_step(v, torch.tensor(0.5), -2, 1, 7)
    assert out.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 0.5]


def test_gradients_by_hand():
    v = torch.tensor([-3.0, -0.76, -0.24, 0.0, 0.26, 0.74, 5.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    quantize_with_step(v, step, -2, 1, 7).backward(upstream)
    assert v.grad.tolist() == [0.0, 2.0, 4.0, 8.0, 16.0, 0.0, 0.0]
    # -2 below; round(r) - r for r = -1.52, -0.48, 0, 0.52; 1 above; over sqrt(7 * 1).
    slopes = [-2.0, -0.48, 0.48, 0.0, 0.48, 1.0, 1.0]
    expected = sum(a * b for a, b in zip(slopes, upstream.tolist(), strict=True)) / math.sqrt(7)
    assert step.grad.item() == pytest.approx(expected, rel=1e-5)


def test_step_gradient_is_that_of_the_surrogate():
    """Finite differences of s * (v / s + constant rounding error), clipped, with s moved alone."""
    torch.manual_seed(0)
    v, high, low = torch.randn(500, dtype=torch.float64), 7, -8
    s = torch.tensor(0.2, requires_grad=True)
    weights = torch.randn(500)
    quantize_with_step(v.float(), s, low, high, 500).backward(weights)

    at = 0.2
    error = torch.round(v / at) - v / at  # held while s moves: rounding passes straight through

    def surrogate(step: float) -> torch.Tensor:
        clipped = (v / step).clamp(low, high)
        inside = (v / at > low) & (v / at < high)
        # v / s moves with s, its rounding as much: d/ds s * (v/s + error) = error.
        out = torch.where(inside, (v / step + error) * step, clipped * step)
        return (out * weights).sum()

    slope = (surrogate(at + 1e-6) - surrogate(at - 1e-6)) / 2e-6
    assert s.grad.item() == pytest.approx(slope.item() / math.sqrt(500 * high), rel=1e-4)


def test_unsigned_and_first_step_by_hand():
    v = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert first_step_size(v, 15).item() == pytest.approx(2 * 2.0 / math.sqrt(15))
    assert first_step_size(torch.zeros(3), 15).item() == 1.0
    out = quantize_with_step(torch.tensor([-1.0, 0.4, 9.0]), torch.tensor(0.5), 0, 3, 3)
    assert out.tolist() == [0.0, 0.5, 1.5]


def test_half_precision_inputs_get_a_float32_step_gradient():
    v = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    step = torch.tensor(0.1, requires_grad=True)
    out = quantize_with_step(v, step, -8, 7, 64)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert v.grad.dtype is torch.bfloat16
    assert step.grad.dtype is torch.float32


def test_the_first_batch_in_training_sets_step_and_sign():
    layer = LearnedStep(4)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    assert torch.equal(layer.eval()(x), x)  # nothing known, nothing quantized
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.train()(x)
    assert (layer.low, layer.high) == (0, 15)
    assert layer.step.item() == pytest.approx(4 / math.sqrt(15))
    layer(torch.tensor([[-100.0, 100.0]]))
    assert layer.step.item() == pytest.approx(4 / math.sqrt(15)) and layer.low == 0
    other = LearnedStep(4).train()
    other(-x)
    assert (other.low, other.high) == (-8, 7)


def test_state_dicts_bring_the_range_along():
    trained = LearnedStep(3).train()
    x = torch.rand(4, 6)
    out = trained(x)
    fresh = LearnedStep(3)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.eval()(x), out)


def test_weights_start_at_once_and_are_counted_as_a_layer():
    w = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    layer = LearnedStep(3, w)
    assert layer.count == 4 and (layer.low, layer.high) == (-4, 3)
    assert layer.step.item() == pytest.approx(2 * 2.5 / math.sqrt(3))


def _run(model: nn.Module) -> TrainingRun:
    def none(digest: str) -> Any:
        raise AssertionError(digest)

    task, structure = cast(Task, None), cast(Structure, None)
    return TrainingRun(model, task, structure, {}, torch.device("cpu"), none, none)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.quantizer = LearnedStep(4, self.weight)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_decay_passes_step_sizes_by(kind):
    """With gradients of zero, decay alone moves a parameter."""
    model = Two()
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    start = model.quantizer.step.item()
    with StepSizes().around(_run(model)):
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            schedule.step()
    assert model.quantizer.step.item() == start
    assert model.weight.abs().sum().item() < 2.999
    assert len(optimizer.param_groups) == 1
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model.parameters()
    ]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # outside of the method decay is back, as a check of this test
    assert model.quantizer.step.item() < start


def test_step_sizes_learn_as_fast_as_their_group():
    model = Two()
    groups = [
        {"params": [model.weight], "lr": 1.0},
        {"params": [model.quantizer.step], "lr": 0.01, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    start = model.quantizer.step.item()
    with StepSizes().around(_run(model)):
        model.quantizer.step.grad = torch.tensor(2.0)
        optimizer.step()
    assert model.quantizer.step.item() == pytest.approx(start - 0.02)


def test_step_sizes_stay_above_zero():
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = model.quantizer.step.item()
    with StepSizes().around(_run(model)):
        for _ in range(2):
            model.quantizer.step.grad = torch.tensor(1e6)
            optimizer.step()
    assert model.quantizer.step.item() == pytest.approx(start / 4)
    model.quantizer.step.grad = torch.tensor(1e6)
    optimizer.step()
    assert model.quantizer.step.item() < 0  # what it would come to otherwise


def _prepared(quantizer: LSQ) -> tuple[ToyTask, nn.Module]:
    task = ToyTask()
    model = task.build_model()
    quantizer.prepare(model, quantizer.choose(model))
    data = task.dataset("calibration")
    quantizer.calibrate(model, task.forward, task.batches(data, range(64), 32, "cpu"))
    return task, model


def test_the_ends_have_eight_bits_and_steps_come_from_the_first_batch():
    quantizer = LSQ(weight_bits=2, activation_bits=3)
    assert quantizer.choose(ToyNet()) == {
        "conv1": Bits(weight=8, input=8),
        "conv2": Bits(weight=2, input=3),
        "conv3": Bits(weight=2, input=3),
        "fc": Bits(weight=8, input=8),
    }
    task, model = _prepared(quantizer)
    first = task.dataset("calibration").tensors[0][:32]
    step = model.conv1.input_quantizer
    assert step.step.item() == pytest.approx(2 * first.abs().mean().item() / math.sqrt(127))
    assert (step.low, step.high) == (-128, 127)  # images have a sign
    assert (model.conv2.input_quantizer.low, model.conv2.input_quantizer.high) == (0, 7)
    assert len(model.conv2.quantized_weight().unique()) <= 4
    assert model.conv2.input_quantizer.training == model.training


def test_step_sizes_are_trained_by_the_tasks_own_optimizer():
    task, model = _prepared(LSQ(weight_bits=3, activation_bits=3))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LearnedStep)}
    before = {name: layer.step.item() for name, layer in layers.items()}
    with StepSizes().around(_run(model)):
        task.train(model, epochs=8)
    for name, layer in layers.items():
        assert 0 < layer.step.item() != before[name], name
    data = task.dataset("test")
    with torch.no_grad():
        hits = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
    assert hits > 0.8


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_are_checked(bits):
    with pytest.raises(ConfigError, match=f"weight_bits must be between 2 and 8, got {bits}; Do"):
        LSQ(weight_bits=bits)
    with pytest.raises(ConfigError, match="input bits of conv2 must be between 2 and 8"):
        LSQ().prepare(ToyNet(), {"conv2": Bits(input=bits)})
