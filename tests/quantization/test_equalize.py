"""Cross-layer equalisation, by hand-computed numbers and by properties."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_nets import call

from raycompress.quantization import PTQ, choices_of
from raycompress.quantization.equalize import equalize, pairs_of
from raycompress.quantization.layers import in_float, quantized_layers
from raycompress.testing import QuantizerContract, ToyNet

EQUALIZED = PTQ(per_channel=False, equalize=True)


class Mobile(nn.Module):
    """Norms, a depthwise convolution, a flattened map, and a layer without a norm."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6), activation())
        self.deep = nn.Sequential(
            nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.BatchNorm2d(6), activation()
        )
        self.narrow = nn.Conv2d(6, 4, 1)
        self.act, self.pool = activation(), nn.MaxPool2d(2)
        self.head, self.last = nn.Linear(4 * 9, 5), nn.Linear(5, 3)
        self.inner = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.narrow(self.deep(self.wide(x)))))
        out: Tensor = self.last(self.inner(self.head(x.flatten(1))))
        return out


def made(kind: Any, seed: int = 0, even: bool = False, **arguments: Any) -> nn.Module:
    """With norms that do something, and channels of very unlike weights unless they are even."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**arguments)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.1, 2)
            elif isinstance(module, nn.Conv2d | nn.Linear) and not even:
                spread = torch.randn(len(module.weight), *[1] * (module.weight.dim() - 1))
                module.weight.data *= spread.exp()
    return model.eval()


def prepared(model: nn.Module, quantizer: PTQ = EQUALIZED) -> nn.Module:
    quantizer.prepare(model, choices_of(model, quantizer, (), (torch.zeros(2, 2, 6, 6),)))
    return model


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    model[0].weight.data = torch.tensor([[4.0], [-1.0], [0.0]])
    model[0].bias.data = torch.tensor([8.0, 1.0, 3.0])
    model[2].weight.data = torch.tensor([[1.0, 4.0, 7.0]])
    model[2].bias.data = torch.tensor([9.0])
    EQUALIZED.prepare(model, EQUALIZED.choose(model))
    # s = sqrt(r1 / r2) = (2, 1/2); the third channel has no range in the first layer.
    pairs = equalize(model, call, torch.tensor([[1.0], [-3.0], [0.4]]))
    assert [(p.first, p.second, p.norm) for p in pairs] == [("0", "2", "")]
    assert torch.equal(model[0].weight, torch.tensor([[2.0], [-2.0], [0.0]]))
    assert torch.equal(model[0].bias, torch.tensor([4.0, 2.0, 3.0]))
    assert torch.equal(model[2].weight, torch.tensor([[2.0, 2.0, 7.0]]))
    assert model[2].bias == 9
    assert model[0].weight_quantizer.high == 2  # the grids follow


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_the_net_stays_the_same_and_ranges_become_alike(seed: int) -> None:
    model, x = made(Mobile, seed).double(), batch(torch.float64)
    with torch.no_grad():
        expected = model(x)
    prepared_model = prepared_double(model)
    pairs = equalize(prepared_model, call, x)
    assert [(p.first, p.second, p.norm, p.depthwise) for p in pairs] == [
        ("wide.0", "deep.0", "wide.1", True),
        ("deep.0", "narrow", "deep.1", False),
        ("narrow", "head", "", False),
        ("head", "last", "", False),
    ]
    with torch.no_grad(), in_float(prepared_model):
        error = (prepared_model(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-10
    for pair in pairs:
        first, second = pair.ranges(prepared_model)
        assert (first / second).log2().abs().max() < 0.01


def prepared_double(model: nn.Module) -> nn.Module:
    x = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    EQUALIZED.prepare(model, choices_of(model, EQUALIZED, (), (x,)))
    return model.double()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity])
def test_positive_homogeneous_activations_let_scales_through(activation: type[nn.Module]) -> None:
    assert len(pairs_of(prepared(made(Mobile, activation=activation)), call, batch())) == 4


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.GELU, nn.Tanh, nn.Hardswish, nn.Softplus])
def test_others_do_not(activation: type[nn.Module]) -> None:
    assert pairs_of(prepared(made(Mobile, activation=activation)), call, batch()) == ()


def test_one_bad_activation_costs_its_own_pair_only() -> None:
    model = made(Mobile)
    model.act = nn.GELU()
    pairs = pairs_of(prepared(model), call, batch())
    assert [pair.first for pair in pairs] == ["wide.0", "deep.0", "head"]


def test_sums_and_what_several_layers_read_are_in_no_pair() -> None:
    # conv1's channels are read twice and summed with conv2's; conv3's go to the last layer alone.
    pairs = pairs_of(prepared(made(ToyNet)), call, batch())
    assert [(pair.first, pair.second) for pair in pairs] == [("conv3", "fc")]


def test_layers_and_norms_that_are_not_quantized_are_left_alone() -> None:
    quantizer = PTQ(per_channel=False, fold_norms=False)
    # A norm that isn't folded in undoes scales of the layer before it.
    pairs = pairs_of(prepared(made(Mobile), quantizer), call, batch())
    assert [pair.first for pair in pairs] == ["narrow", "head"]
    model = made(Mobile)
    choices = choices_of(model, EQUALIZED, (), (batch(),))
    del choices["deep.0"]
    EQUALIZED.prepare(model, choices)
    assert [pair.first for pair in pairs_of(model, call, batch())] == ["narrow", "head"]
    model = made(Mobile)
    model.wide[1] = nn.BatchNorm2d(6, affine=False).eval()
    assert [p.first for p in pairs_of(prepared(model), call, batch())] == [
        "deep.0",
        "narrow",
        "head",
    ]


@pytest.mark.parametrize("corrected", [False, True])
def test_calibrating_again_changes_nothing_and_rebuilt_models_are_the_same(
    corrected: bool,
) -> None:
    quantizer = PTQ(per_channel=False, equalize=True, bias_correction=corrected)
    model = prepared(made(Mobile), quantizer)
    quantizer.calibrate(model, call, [batch()])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantizer.calibrate(model, call, [batch()])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    fresh = prepared(made(Mobile, 5), quantizer)
    fresh.load_state_dict(model.state_dict())
    plain = made(Mobile)
    with torch.no_grad():
        for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(batch()), model(batch()))
        with in_float(model):
            assert torch.allclose(model(batch()), plain(batch()), rtol=1e-4, atol=1e-5)


def test_it_undoes_scales_that_one_grid_for_all_channels_suffers_from() -> None:
    """The same net with channels of very unlike ranges, as training can leave them."""
    plain, x = made(Mobile, even=True), batch()

    def error(quantizer: PTQ) -> float:
        model = prepared(made(Mobile, even=True), quantizer)
        generator = torch.Generator().manual_seed(2)
        for pair in pairs_of(model, call, x):
            pair.scale(model, torch.randn(len(pair.rows), generator=generator).mul(2).exp())
        for layer in quantized_layers(model).values():
            layer.weight_quantizer.settle(layer.weight)
        quantizer.calibrate(model, call, [x])
        with torch.no_grad():
            return float((model(x) - plain(x)).square().mean())

    assert error(PTQ(per_channel=False, equalize=True)) < error(PTQ(per_channel=False)) / 10


class TestContract(QuantizerContract):
    quantizer: ClassVar = PTQ(equalize=True, bias_correction=True, per_channel=False)

    def _net(self) -> nn.Module:
        """With ReLU, that there is a pair."""
        net = super()._net()
        net[2] = nn.ReLU()
        return net

    def test_keys_of_the_float_model_stay(self) -> None:
        """In float it is the float model."""
        before, model = self._net(), self._prepared()
        assert set(before.state_dict()) < set(model.state_dict())
        x = self._batches()[0]
        with torch.no_grad(), in_float(model):
            assert torch.allclose(model(x), before(x), atol=1e-5)
