"""Bias correction, by hand-computed numbers and by properties."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from toy_nets import call, toy_net

from raycompress.quantization import PTQ, Bits, choices_of
from raycompress.quantization.layers import in_float, quantized_layers
from raycompress.testing import QuantizerContract

CORRECTED = PTQ(weight_bits=3, input_bits=4, bias_correction=True)


def batches(shift: float = 0.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, 6, 6, generator=generator) + shift for n in (16, 16, 9)]


def calibrated(quantizer: PTQ = CORRECTED) -> nn.Module:
    model = toy_net()
    quantizer.prepare(model, choices_of(model, quantizer, (), (batches()[0],)))
    quantizer.calibrate(model, call, batches())
    return model


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1)).eval()
    model[0].weight.data = torch.tensor([[3.0], [1.2]])  # per layer: S = 1, becomes 3 and 1
    model[1].weight.data = torch.tensor([[3.0, 2.8]])  # S = 1: becomes 3 and 3
    model[1].bias.data = torch.tensor([5.0])
    quantizer = PTQ(per_channel=False, bias_correction=True)
    bits = Bits(weight=3)
    quantizer.prepare(model, {"0": bits, "1": bits})
    quantizer.calibrate(model, call, [torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0]])])
    # The mean input is 3: the second channel's mean is 3.6 and became 3.
    assert torch.allclose(model[0].bias, torch.tensor([0.0, 0.6]))
    assert torch.equal(model[0].float_bias, torch.zeros(2))
    # Behind that, 3 * 9 + 3 * 3.6 against 3 * 9 + 2.8 * 3.6: 0.72 too much.
    assert torch.allclose(model[1].bias, torch.tensor([5 - 0.72]))


def channel_means(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in model.named_modules():
        if hasattr(layer, "weight_quantizer"):

            def hook(_: Any, args: Any, out: Tensor, name: str = name) -> None:
                rows = out.double().movedim(1, -1).reshape(-1, out.shape[1])
                found.setdefault(name, []).append(rows)

            handles.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        for batch in batches():
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).mean(0) for name, rows in found.items()}


def test_every_channel_has_the_float_models_mean() -> None:
    def worst(model: nn.Module) -> float:
        got = channel_means(model)
        with in_float(model):
            wanted = channel_means(model)
        return max(float((wanted[name] - got[name]).abs().max()) for name in wanted)

    assert set(channel_means(calibrated())) == set(quantized_layers(calibrated()))
    plain = calibrated(PTQ(weight_bits=3, input_bits=4))
    assert worst(plain) > 1e-2
    assert worst(calibrated()) < 1e-5


def test_float_is_what_it_was_and_calibrating_again_changes_nothing() -> None:
    model, plain = calibrated(), toy_net()
    with torch.no_grad(), in_float(model):
        assert torch.equal(model(batches()[0]), plain(batches()[0]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    CORRECTED.calibrate(model, call, batches())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not torch.equal(model.conv1.bias, model.conv1.float_bias)


def test_rebuilt_copied_and_pickled_models_compute_the_same() -> None:
    model, fresh = calibrated(), toy_net(7)
    CORRECTED.prepare(fresh, choices_of(fresh, CORRECTED, (), (batches()[0],)))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(batches()[0]), model(batches()[0]))
            with in_float(other), in_float(model):
                assert torch.equal(other(batches()[0]), model(batches()[0]))


@pytest.mark.parametrize("sizes", [(2,), (3, 2), (2, 3, 2)])
def test_layers_that_are_called_often_or_not_at_all(sizes: tuple[int, ...]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(self.a(x).relu()))
            return out

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Net().eval(), torch.randn(sizes)
    quantizer = PTQ(weight_bits=2, input_bits=8, bias_correction=True)
    quantizer.prepare(model, {name: Bits(weight=2, output=2) for name in ("a", "b", "unused")})
    quantizer.calibrate(model, call, [x])
    assert torch.equal(model.unused.bias, model.unused.float_bias)
    assert model.b.output_quantizer is not None
    model.b.output_quantizer = None
    with torch.no_grad():
        got = model(x)
        with in_float(model):
            wanted = model(x)
    assert torch.allclose(got.mean(), wanted.mean(), atol=1e-6)


class TestContract(QuantizerContract):
    quantizer: ClassVar = CORRECTED

    def test_keys_of_the_float_model_stay(self) -> None:
        """With their values but for biases; in float it is the float model."""
        before, model = self._net(), self._prepared()
        after = model.state_dict()
        for key, value in before.state_dict().items():
            moved = after.get(key.replace(".bias", ".float_bias"), after[key])
            assert key in after and torch.equal(moved, value)
        with torch.no_grad(), in_float(model):
            assert torch.equal(model(self._batches()[0]), before(self._batches()[0]))
