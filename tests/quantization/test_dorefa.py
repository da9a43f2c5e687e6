import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycompress.quantization.dorefa import (
    GradientRounding,
    binarize_by_mean,
    quantize_activation,
    quantize_gradient,
    quantize_weight,
)


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
