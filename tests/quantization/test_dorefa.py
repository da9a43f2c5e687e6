import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raycompress.errors import ConfigError
from raycompress.quantization.dorefa import (
    DoReFa,
    GradientRounding,
    binarize_by_mean,
    quantize_activation,
    quantize_gradient,
    quantize_weight,
)
from raycompress.quantization.layers import quantized_layers
from raycompress.quantization.quantizer import Bits
from raycompress.testing import ToyNet, ToyTask


def test_weights_by_hand():
    w = torch.tensor([math.atanh(0.8), math.atanh(-0.4), 0.0, math.atanh(0.2)])
    # tanh / (2 * 0.8) + 0.5 = 1, 0.25, 0.5, 0.625; times 3: 3, 0.75, 1.5, 1.875.
    out = quantize_weight(w, 2)
    assert torch.allclose(out, torch.tensor([1.0, -1 / 3, 1 / 3, 1 / 3]))


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_weights_have_at_most_two_to_the_k_levels_and_reach_one(bits, seed):
    w = torch.randn(8, 50, generator=torch.Generator().manual_seed(seed)) * (seed + 1) / 300
    out = quantize_weight(w, bits)
    assert out.min() >= -1 and out.max() <= 1
    assert len(out.unique()) <= 2**bits
    largest = w.abs().argmax()
    assert out.flatten()[largest] == w.flatten()[largest].sign()
    other = -w
    assert quantize_weight(other, bits).flatten()[largest] == -w.flatten()[largest].sign()


def test_many_weights_use_every_level():
    w = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert len(quantize_weight(w, 3).unique()) == 8


def test_one_bit_is_the_mean_times_the_sign_over_the_whole_layer():
    w = torch.tensor([[0.5, -1.0], [0.0, 2.5]], requires_grad=True)
    out = quantize_weight(w, 1)
    assert out.tolist() == [[1.0, -1.0], [1.0, 1.0]]
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    out.backward(upstream)
    assert torch.equal(w.grad, upstream)  # the mean is no part of the gradient
    assert binarize_by_mean(3 * w).unique().tolist() == [-3.0, 3.0]


def test_thirty_two_bits_change_nothing():
    x = torch.randn(50) * 3
    assert torch.equal(quantize_weight(x, 32), x)
    assert torch.equal(quantize_activation(x, 32), x)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_gradient_is_that_of_the_map_before_rounding(bits):
    w = torch.randn(6, 5, requires_grad=True)
    upstream = torch.randn(6, 5)
    quantize_weight(w, bits).backward(upstream)
    bent = torch.tanh(w.detach())
    assert torch.allclose(w.grad, upstream * (1 - bent**2) / bent.abs().max())


def test_weights_that_are_all_zero_stay_finite():
    out = quantize_weight(torch.zeros(4), 2)
    assert torch.isfinite(out).all() and len(out.unique()) == 1


def test_activations_by_hand_with_a_gradient_inside_the_range_alone():
    x = torch.tensor([-0.5, 0.0, 0.2, 0.6, 1.0, 1.7], requires_grad=True)
    out = quantize_activation(x, 2)
    assert torch.allclose(out, torch.tensor([0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0]))
    out.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    one = torch.tensor([0.4, 0.6], requires_grad=True)
    quantize_activation(one, 1).sum().backward()
    assert quantize_activation(one, 1).tolist() == [0.0, 1.0]
    assert one.grad.tolist() == [1.0, 1.0]


def test_gradients_by_hand():
    gradient = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.0, -0.2], [0.0, 0.0, 0.0]])
    out = quantize_gradient(gradient, 2, torch.zeros(3, 3))
    # Row 0, m = 2: g / 4 + 0.5 = 1, 0.25, 0.625, times 3: 3, 0.75, 1.875, so 1, 1/3, 2/3.
    # Row 1, m = 0.2: 0.75, 0.5, 0, times 3: 2.25, 1.5, 0, so 2/3, 2/3 (even), 0.
    expected = [[2.0, -2 / 3, 2 / 3], [0.2 / 3, 0.2 / 3, -0.2], [0.0, 0.0, 0.0]]
    assert torch.allclose(out, torch.tensor(expected))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_quantized_gradients_are_unbiased(bits):
    generator = torch.Generator().manual_seed(bits)
    gradient = torch.tensor([[1.0, -0.7, 0.3, 0.04, 0.0, -1.0], [4.0, 0.1, -3.9, 2.0, 1.0, 0.5]])
    draws = 20_000
    total, squares = torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    for _ in range(draws // 1000):
        many = gradient.repeat(1000, 1)
        noise = torch.rand(many.shape, generator=generator) - 0.5
        out = quantize_gradient(many, bits, noise).double().view(1000, 2, 6)
        total += out.sum(0)
        squares += (out**2).sum(0)
    mean = total / draws
    sigma = ((squares / draws - mean**2).clamp(min=0) / draws).sqrt()
    assert ((mean - gradient.double()).abs() <= 4 * sigma + 1e-6).all()


def test_noise_is_drawn_for_each_element():
    from raycompress.quantization.dorefa import _Gradient

    torch.manual_seed(0)
    x = torch.zeros(1000, 3, requires_grad=True)
    upstream = torch.tensor([1.0, 0.3, 0.3]).repeat(1000, 1)
    _Gradient.apply(x, 1).backward(upstream)
    first, second = x.grad[:, 1], x.grad[:, 2]
    assert set(first.tolist()) == {-1.0, 1.0}
    # One noise for an example would make these equal, and their correlation 1.
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.15


def test_each_example_has_its_own_maximum():
    gradient = torch.tensor([[[1.0, 0.2]], [[100.0, 3.0]]])
    out = quantize_gradient(gradient, 8, torch.zeros_like(gradient))
    assert out[0, 0, 1].item() == pytest.approx(0.2, abs=2 / 255)


def test_gradients_are_quantized_in_training_alone():
    layer = GradientRounding(2)
    upstream = torch.tensor([[1.0, 0.3, -0.2, 0.7]])
    grads = {}
    for mode in (True, False):
        x = torch.zeros(1, 4, requires_grad=True)
        out = layer.train(mode)(x)
        out.backward(upstream)
        grads[mode] = x.grad
    assert torch.equal(grads[False], upstream)
    levels = torch.tensor([-1, -1 / 3, 1 / 3, 1])
    assert (grads[True].T - levels).abs().min(dim=1).values.max() < 1e-6
    assert not torch.equal(grads[True], upstream)


def test_the_first_and_the_last_layer_stay_in_float():
    model = ToyNet()
    quantizer = DoReFa(weight_bits=2, activation_bits=3, gradient_bits=4)
    choices = quantizer.choose(model)
    assert choices == dict.fromkeys(["conv2", "conv3"], Bits(weight=2, input=3))
    keys = set(model.state_dict())
    quantizer.prepare(model, choices)
    assert set(model.state_dict()) == keys
    assert list(quantized_layers(model)) == ["conv2", "conv3"]
    assert len(model.conv2.quantized_weight().unique()) <= 4
    assert type(model.conv1) is nn.Conv2d and type(model.fc) is nn.Linear
    seen = []
    model.conv2.input_quantizer.register_forward_hook(lambda *args: seen.append(args[2]))
    model.eval()(torch.randn(4, 2, 6, 6))
    assert set((seen[0] * 7).round().unique().tolist()) <= set(range(8))
    assert torch.allclose(seen[0] * 7, (seen[0] * 7).round(), atol=1e-5)
    with pytest.raises(ConfigError, match="no layer between its first and its last"):
        quantizer.choose(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_thirty_two_bits_train_as_float():
    task = ToyTask()
    plain, model = task.build_model(), task.build_model()
    quantizer = DoReFa(weight_bits=32, activation_bits=32, gradient_bits=32)
    quantizer.prepare(model, quantizer.choose(model))
    for each in (plain, model):
        task.train(each, epochs=1)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_quantized_gradients_reach_the_weights_and_the_weights_stay_float():
    task = ToyTask()
    model = task.build_model()
    quantizer = DoReFa(weight_bits=1, activation_bits=4, gradient_bits=6)
    quantizer.prepare(model, quantizer.choose(model))
    seen = []
    model.conv2.output_quantizer.register_full_backward_hook(lambda m, i, o: seen.append(i[0]))
    before = model.conv2.weight.detach().clone()
    task.train(model, epochs=2)
    assert len(seen[0].unique()) > 2
    for example in seen[0][:4]:
        levels = (example / example.abs().max() + 1) / 2 * 63
        assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert len(model.conv2.weight.unique()) > 100
    assert not torch.equal(before, model.conv2.weight)


@pytest.mark.parametrize("key", ["weight_bits", "activation_bits", "gradient_bits"])
@pytest.mark.parametrize("bits", [0, 9, 16])
def test_bits_are_checked(key, bits):
    with pytest.raises(ConfigError, match=f"{key} must be between 1 and 8, or 32 for float, got"):
        DoReFa(**{key: bits})
