import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import raycompress
from raycompress.errors import ArtifactError
from raycompress.quantization.bnn import BNN
from raycompress.quantization.dorefa import DoReFa
from raycompress.quantization.layers import attach
from raycompress.quantization.lowering.packed import load_packed, save_packed
from raycompress.quantization.lsq import LSQ
from raycompress.quantization.naive import NaiveQuantizer
from raycompress.quantization.qat import QAT
from raycompress.quantization.quantizer import Bits, Quantizer, default_layers
from raycompress.quantization.targets import choices_of
from raycompress.testing import ToyNet, ToyTask


class Gridded(nn.Module):
    """Rounds to a grid for each output channel, with a factor before and after, or not."""

    def __init__(self, weight, bits, folded):
        super().__init__()
        top = 2 ** (bits - 1) - 1
        self.bits, self.low, self.high = bits, -top, top
        shape = (-1, *[1] * (weight.dim() - 1))
        self.scaling = torch.linspace(0.3, 2.1, len(weight)).view(shape)
        if folded:
            self.factor = lambda weight: self.scaling
        folded_weight = weight.detach() * (self.scaling if folded else 1)
        self.scale = folded_weight.flatten(1).abs().amax(1) / top
        self.zero_point = torch.zeros(len(weight), dtype=torch.int32)
        self.shape = shape

    @property
    def grid(self):
        return self

    def integers(self, x):
        return (x / self.scale.view(self.shape)).round().clamp(self.low, self.high).int()

    def forward(self, weight):
        factor = self.factor(weight) if hasattr(self, "factor") else 1
        return self.integers(weight * factor).float() * self.scale.view(self.shape) / factor


@dataclass(frozen=True, kw_only=True)
class PerChannel(Quantizer):
    """A quantizer of somebody's own."""

    bits: int = 8
    folded: bool = False

    def choose(self, model):
        return dict.fromkeys(default_layers(model), Bits(weight=self.bits))

    def prepare(self, model, choices):
        for name, bits in choices.items():
            layer = model.get_submodule(name)
            attach(layer, weight=Gridded(layer.weight, bits.weight, self.folded))


QUANTIZERS = {
    "naive-8": NaiveQuantizer(),
    "naive-3": NaiveQuantizer(weight_bits=3, per_channel=True),
    "qat-8": QAT(),
    "qat-4": QAT(weight_bits=4, input_bits=4),
    "qat-tensor": QAT(per_channel=False),
    "qat-plain": QAT(fold_norms=False),
    "dorefa-1": DoReFa(weight_bits=1, activation_bits=2),
    "dorefa-3": DoReFa(weight_bits=3, activation_bits=4, gradient_bits=6),
    "lsq-4": LSQ(weight_bits=4, activation_bits=4),
    "lsq-2": LSQ(weight_bits=2, activation_bits=2),
}


def _quantized(quantizer, width=8, train=True):
    task = ToyTask(width)
    model = task.build_model()
    choices = choices_of(model, quantizer, (), task.example_inputs())
    quantizer.prepare(model, choices)
    data = task.dataset("calibration")
    quantizer.calibrate(model, task.forward, task.batches(data, range(64), 32, "cpu"))
    if train:
        task.train(model, epochs=1)
    return task, model.eval(), choices


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_loaded_model_is_the_same_to_the_bit(name, tmp_path):
    quantizer = QUANTIZERS[name]
    task, model, choices = _quantized(quantizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saved = save_packed(model, tmp_path / "m.safetensors", quantizer, choices)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    loaded = load_packed(saved.path, task.build_model().eval())
    x = task.dataset("test").tensors[0]
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    assert saved.file_bytes == (tmp_path / "m.safetensors").stat().st_size
    assert [layer.name for layer in saved.layers] == list(choices)
    for layer in saved.layers:
        assert 1 <= layer.bits <= choices[layer.name].weight
    assert "run in simulation" in str(saved)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_grids_for_each_channel_are_stored_as_integers_and_scales(bits, folded, tmp_path):
    quantizer = PerChannel(bits=bits, folded=folded)
    task, model, choices = _quantized(quantizer, width=16, train=False)
    saved = save_packed(model, tmp_path / "m.safetensors", quantizer, choices)
    assert [layer.bits for layer in saved.layers] == [bits] * 4
    with safe_open(saved.path, "pt") as file:
        assert file.get_tensor("conv2.weight.scale").shape == (16,)
        assert ("conv2.weight.factor" in file.keys()) is folded
    with pytest.raises(ArtifactError, match=r"quantized by test_packed:PerChannel: pass"):
        load_packed(saved.path, task.build_model())
    loaded = load_packed(saved.path, task.build_model().eval(), quantizer)
    x = task.dataset("test").tensors[0]
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_many_values_without_a_grid_stay_in_float_and_are_said(tmp_path):
    quantizer = PerChannel()
    _, model, choices = _quantized(quantizer, width=16, train=False)
    model.conv2.weight_quantizer.factor = lambda weight: 1 + weight.abs()  # no such grid
    saved = save_packed(model, tmp_path / "m.safetensors", quantizer, choices)
    found = {layer.name: layer for layer in saved.layers}
    assert found["conv2"].bits is None and "more than 256" in found["conv2"].reason
    assert "1 in float" in str(saved)


def test_signs_take_one_bit(tmp_path):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).eval()
    quantizer = BNN()
    choices = quantizer.choose(model)
    quantizer.prepare(model, choices)
    saved = save_packed(model, tmp_path / "m.safetensors", quantizer, choices)
    with safe_open(saved.path, "pt") as file:
        assert file.get_tensor("1.weight.codes").shape == (64 * 64 // 8,)
        assert file.get_tensor("1.weight.levels").tolist() == [-1.0, 1.0]
        assert "1.weight" not in file.keys()
    fresh = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).eval()
    x = torch.randn(5, 64)
    with torch.inference_mode():
        assert torch.equal(load_packed(saved.path, fresh)(x), model(x))


def test_four_bits_are_an_eighth_of_a_file_that_is_mostly_weights(tmp_path):
    quantizer = LSQ(weight_bits=4, activation_bits=4, end_bits=4)
    _, model, choices = _quantized(quantizer, width=64, train=False)
    saved = save_packed(model, tmp_path / "m.safetensors", quantizer, choices)
    assert saved.file_bytes < 0.15 * saved.float_bytes


@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_round_trip_for_any_bits_and_shape(bits, inputs, outputs, seed):
    import tempfile

    def net():
        return nn.Sequential(nn.Linear(inputs, outputs), nn.Conv1d(outputs, inputs, 1))

    torch.manual_seed(seed)
    model = net().eval()
    quantizer = LSQ(weight_bits=bits, activation_bits=bits, end_bits=bits)
    choices = quantizer.choose(model)
    quantizer.prepare(model, choices)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_packed(model, f"{folder}/m.safetensors", quantizer, choices)
        loaded = load_packed(saved.path, net())
    for index in (0, 1):
        assert torch.equal(loaded[index].weight, model[index].quantized_weight())
        assert saved.layers[index].bits <= bits


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x)))


def test_a_weight_with_two_owners_stays_in_float_and_is_said(tmp_path):
    model = Tied().eval()
    quantizer = LSQ()
    choices = quantizer.choose(model)
    quantizer.prepare(model, choices)
    saved = save_packed(model, tmp_path / "m.safetensors", quantizer, choices)
    found = {layer.name: layer for layer in saved.layers}
    assert found["first"].bits is None and "another layer" in found["first"].reason
    assert found["last"].bits is not None
    x = torch.randn(3, 6)
    with torch.inference_mode():
        assert torch.equal(load_packed(saved.path, Tied().eval())(x), model(x))


def test_files_that_do_not_fit_are_refused(tmp_path):
    quantizer = QUANTIZERS["lsq-4"]
    _, model, choices = _quantized(quantizer, train=False)
    path = save_packed(model, tmp_path / "m.safetensors", quantizer, choices).path
    with pytest.raises(ArtifactError, match=r"holds packed weights: load it by .*load_packed"):
        raycompress.load(path, ToyNet())
    with pytest.raises(ArtifactError, match="doesn't fit a Sequential"):
        load_packed(path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ArtifactError, match="was the ToyNet made with the same arguments"):
        load_packed(path, ToyNet(4))
    with pytest.raises(ArtifactError, match=r"packed weights are \.safetensors"):
        save_packed(model, tmp_path / "m.pt", quantizer, choices)

    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    recipe = json.loads(header["__metadata__"]["raycompress"])

    def tamper(**changes):
        header["__metadata__"]["raycompress"] = json.dumps({**recipe, **changes})
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    tamper(quantizer={"type": "os:system"})
    with pytest.raises(ArtifactError, match="quantized by os:system: pass `quantizer`"):
        load_packed(path, ToyNet())
    packed = {**recipe["packed"], "conv2": {"bits": 7, "shape": [8, 8, 3, 3]}}
    tamper(packed=packed)
    with pytest.raises(ArtifactError, match=r"is damaged: weights of 'conv2': 576 codes of 7"):
        load_packed(path, ToyNet())
    tamper(packed=7)
    with pytest.raises(ArtifactError, match="holds no packed weights"):
        load_packed(path, ToyNet())
