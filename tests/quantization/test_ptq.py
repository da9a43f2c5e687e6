"""Post-training quantization, by hand-computed numbers and by properties."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_nets import call, toy_net

from raycompress.errors import ConfigError, EvaluationError
from raycompress.quantization import PTQ, Bits, choices_of
from raycompress.quantization.layers import in_float, quantized_layers
from raycompress.quantization.observers import OBSERVERS
from raycompress.quantization.qat import FoldedWeight
from raycompress.testing import ToyTask


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 2, 6, 6, generator=generator) for _ in range(3)]


def calibrated(quantizer: PTQ, model: nn.Module | None = None) -> nn.Module:
    model = toy_net() if model is None else model
    quantizer.prepare(model, choices_of(model, quantizer, (), (batches()[0],)))
    quantizer.calibrate(model, call, batches())
    return model


def test_ranges_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).eval()
    model[0].weight.data = torch.tensor([[1.0, -2.1]])
    quantizer = PTQ(observer="minmax")
    quantizer.prepare(model, {"0": Bits(weight=4, input=2, output=2)})
    # Inputs from -1 to 5 over both batches: S = 6/3, Z = round(1/2) = 0 (half to even).
    quantizer.calibrate(model, call, [torch.tensor([[-1.0, 2.0]]), torch.tensor([[5.0, 0.0]])])
    layer = model[0]
    assert layer.input_quantizer.scale == 2 and layer.input_quantizer.zero_point == 0
    # Outputs of the float layer: -5.2 and 5, so S = 10.2/3 = 3.4 and Z = round(1.53) = 2.
    assert layer.output_quantizer.scale == pytest.approx(3.4)
    assert layer.output_quantizer.zero_point == 2
    assert layer.weight_quantizer.scale == pytest.approx(0.3)
    # w is (round(3.33), -7) * 0.3 = (0.9, -2.1),
    # and x = (2.9, -3) becomes (2, 0): 1.8 is 1 of step 3.4.
    assert model(torch.tensor([[2.9, -3.0]])).item() == pytest.approx(3.4)
    # x = (0, 9) becomes (0, 6), the largest: -12.6 is beyond -2 * 3.4, the lowest.
    assert model(torch.tensor([[0.0, 9.0]])).item() == pytest.approx(-6.8)


@pytest.mark.parametrize("observer", OBSERVERS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99), bits=st.integers(2, 8), shift=st.floats(-3, 3))
def test_ranges_hold_zero_exactly(observer: str, seed: int, bits: int, shift: float) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    quantizer = PTQ(observer=observer)
    quantizer.prepare(model, {"0": Bits(weight=8, input=bits, output=bits)})
    generator = torch.Generator().manual_seed(seed)
    quantizer.calibrate(model, call, [torch.randn(20, 4, generator=generator) + shift])
    for part in ("input", "output"):
        fake = model[0].get_submodule(f"{part}_quantizer")
        assert fake.low <= 0 <= fake.high
        assert fake(torch.zeros(1)) == 0


def test_observers_see_the_float_model() -> None:
    """Not the rounded one: at 2 bits the second layer's inputs would be others."""
    x = batches()[0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Linear(8, 8)).eval()
    plain = copy.deepcopy(model)
    quantizer = PTQ(observer="minmax", weight_bits=2, input_bits=2)
    quantizer.prepare(model, quantizer.choose(model))
    quantizer.calibrate(model, call, [x])
    seen = plain[:2](x)
    assert model[2].input_quantizer.low == seen.min()
    assert model[2].input_quantizer.high == seen.max()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibrating_again_changes_nothing(observer: str) -> None:
    model = calibrated(PTQ(observer=observer, input_bits=4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    PTQ(observer=observer, input_bits=4).calibrate(model, call, batches())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_modes_stay() -> None:
    model = toy_net().train()
    model.bn1.eval()
    quantizer = PTQ()
    quantizer.prepare(model, quantizer.choose(model))
    before = model.bn2.running_mean.clone()
    quantizer.calibrate(model, call, batches())
    assert model.training and model.bn2.training and not model.bn1.training
    assert torch.equal(model.bn2.running_mean, before)


def test_weights_are_rounded_as_folded() -> None:
    model = calibrated(PTQ())
    assert isinstance(model.conv1.weight_quantizer, FoldedWeight)
    plain = calibrated(PTQ(fold_norms=False))
    assert not isinstance(plain.conv1.weight_quantizer, FoldedWeight)


@pytest.mark.parametrize("quantizer", [PTQ(), PTQ(per_channel=False, observer="entropy")])
def test_rebuilt_copied_and_pickled_models_compute_the_same(quantizer: PTQ) -> None:
    model, x = calibrated(quantizer), batches(1)[0]
    fresh = toy_net(seed=7)
    quantizer.prepare(fresh, choices_of(fresh, quantizer, (), (x,)))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)


def test_in_float_is_the_float_model() -> None:
    model, plain, x = calibrated(PTQ(input_bits=2)), toy_net(), batches()[0]
    with torch.no_grad():
        rounded = model(x)
        with in_float(model):
            assert torch.equal(model(x), plain(x))
            assert not quantized_layers(model)
        assert torch.equal(model(x), rounded) and not torch.equal(rounded, plain(x))


def test_quantize() -> None:
    task = ToyTask(num=32)
    model = task.build_model().eval()
    quantized = PTQ().quantize(model, task)
    x = task.dataset("test").tensors[0]
    with torch.no_grad():
        exact, rounded = model(x), quantized(x)
    noise = float((exact - rounded).square().mean() / exact.square().mean())
    assert 0 < noise < 1e-3
    with pytest.raises(ConfigError, match="PTQ isn't trained: epochs must be 0"):
        PTQ().quantize(model, task, epochs=1)


def test_errors() -> None:
    with pytest.raises(ConfigError, match="input_bits must be an integer between 2 and 8, got 9"):
        PTQ(input_bits=9)
    with pytest.raises(ConfigError, match=r"observer must be one of minmax, .*'mean'"):
        PTQ(observer="mean")
    with pytest.raises(ConfigError, match="percentile must be above 50"):
        PTQ(observer="percentile", percentile=20)
    with pytest.raises(ConfigError, match="percentile is for the observer 'percentile', got"):
        PTQ(percentile=99.9)
    assert PTQ(observer="percentile", percentile=99.9).percentile == 99.9
    model = toy_net()
    PTQ().prepare(model, PTQ().choose(model))
    with pytest.raises(ConfigError, match="no batch"):
        PTQ().calibrate(model, call, [])
    with pytest.raises(EvaluationError, match="the input of 'conv1': calibration data gave an"):
        PTQ().calibrate(model, call, [torch.full((1, 2, 6, 6), math.nan)])
    nn.init.constant_(model.bn1.bias, math.inf)
    with pytest.raises(EvaluationError, match="the input of 'conv2'"):
        PTQ().calibrate(model, call, batches())


def test_layers_that_calibration_never_calls_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(72, 3), nn.Linear(3, 3))
    PTQ().prepare(model, PTQ().choose(model))
    PTQ().calibrate(model, lambda m, x: m[0](x.flatten(1)), batches())
    assert "the input of '1' has no range" in caplog.text
