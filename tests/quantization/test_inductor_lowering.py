"""Lowering to torch's compiler. What compiles takes seconds each, so few do."""

import copy
import platform
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.nn import functional

import raycompress
from raycompress.artifacts.pt2 import load_program, save_program
from raycompress.driver import validate
from raycompress.errors import ConfigError, InputError, VerificationError
from raycompress.quantization import QAT, Bits, choices_of
from raycompress.quantization.lowering import lowering
from raycompress.quantization.lowering.compiled import CompiledProgram
from raycompress.quantization.lowering.graph import integer_program
from raycompress.quantization.lowering.inductor import load_inductor, lower

COMPILES = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="needs g++ and Python's headers",
)


class Net(nn.Module):
    """Convolutions of one channel, that run twice, that additions read; one is left in float."""

    def __init__(self, c=16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, c, 3, padding=1), nn.BatchNorm2d(c)
        self.twice, self.plain = nn.Conv2d(c, c, 3, padding=1, groups=2), nn.Conv2d(c, c, 1)
        self.fc = nn.Linear(c, 10)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(x))), 2)
        x = x + self.twice(functional.relu(self.twice(x)))
        return {"logits": self.fc(functional.relu6(self.plain(x)).mean((2, 3)))}


class Mixer(nn.Module):
    """Layers of three dims; the caller's own tensor is added to what a layer returns."""

    def __init__(self, d=32):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 64), nn.Linear(64, d)

    def forward(self, x):
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def _quantized(model, x, choices=None):
    quantized = copy.deepcopy(model)
    quantizer = QAT()
    quantizer.prepare(quantized, choices or choices_of(quantized, quantizer, (), (x[:2],)))
    quantizer.calibrate(quantized, lambda m, batch: m(batch), [x])
    return quantized.eval()


def _net():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(32, 1, 8, 8)
    names = ("stem", "twice", "fc")
    choices = dict.fromkeys(names, Bits(weight=8, input=8)) | {"plain": Bits(weight=8)}
    return model, x, _quantized(model, x, choices)


def _difference(one, two):
    return float((one - two).square().mean().sqrt() / two.square().mean().sqrt())


def _stored(folder):
    _, x, quantized = _net()
    made = integer_program(quantized, (x[:2],), lambda m: m(x), int32_bias=False)
    path = folder / "quantized.pt2"
    save_program(made.program, made.inputs, path, made.program.module(), name="Net")
    return path, x, quantized


def test_what_is_stored_computes_in_float_what_the_simulation_does(tmp_path):
    path, x, quantized = _stored(tmp_path)
    loaded = raycompress.load(path)
    assert loaded.meta["raycompress"]["model"] == "Net"
    with torch.no_grad():
        assert _difference(loaded(x)["logits"], quantized(x)["logits"]) < 0.02
    program = load_program(path)
    kinds = {name: tensor.dtype for name, tensor in program.state_dict.items()}
    assert {kinds[f"{name}.weight"] for name in ("stem", "twice", "plain", "fc")} == {torch.int8}


def test_other_tensors_than_the_program_takes_are_refused(tmp_path):
    path, x, _ = _stored(tmp_path)
    model = CompiledProgram(load_program(path))
    assert model.layers == ("stem", "twice", "fc")
    takes = r"the program takes \(batch, 1, 8, 8\) of float32, got"
    with pytest.raises(InputError, match=takes + r" \(4, 1, 9, 8\) of float32"):
        model(torch.zeros(4, 1, 9, 8))
    with pytest.raises(InputError, match=takes + r" \(32, 1, 8, 8\) of float64"):
        model(x.double())
    with pytest.raises(InputError, match=takes + " no tensors"):
        model(None)


@COMPILES
def test_jobs_that_ask_for_other_bits_are_refused():
    entries = [{"op_names": ["fc"], "quant_bits": 4}]
    job = {
        "name": "toy",
        "task": "raycompress.testing:ToyTask",
        "quantize": {"type": "QAT", "lower": "inductor", "config_list": entries},
        "cluster": {"executor": "local"},
    }
    text = (
        r"quantize\.lower: inductor computes in 8 bits, and the weight of 'fc' has 4; lower: "
        "packed stores any number of bits, and runs in simulation"
    )
    with pytest.raises(ConfigError, match=text):
        validate(job)


def test_what_it_needs_is_said(monkeypatch):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(ConfigError, match=r"a C\+\+ compiler: there is no no-such-compiler "):
            lowering("inductor")
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
        with pytest.raises(ConfigError, match=r"there is no /nowhere/Python\.h \(Debian: apt"):
            lowering("inductor")
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        with pytest.raises(ConfigError, match=r"this one is aarch64\. lower: onnx runs here"):
            lowering("inductor")


@COMPILES
@pytest.mark.slow
def test_all_layers_run_in_integers_at_any_batch_size(tmp_path):
    model, x, quantized = _net()
    lowered = lower(quantized, model, (x[:2],), tmp_path, lambda m: m(x))
    assert lowered.layers_integer == ("stem", "twice", "fc")
    loaded, read = load_inductor(lowered.path), x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for batch in (x, x[:1], x[:7], read):
            real = lowered.model(batch)["logits"]
            assert _difference(real, quantized(batch)["logits"]) < 0.02
        assert torch.equal(loaded(x[:1])["logits"], lowered.model(x[:1])["logits"])
        assert _difference(lowered.reference(x)["logits"], model(x)["logits"]) < 1e-5


@COMPILES
@pytest.mark.slow
def test_scales_are_those_that_were_trained_and_tensors_stay_the_callers(tmp_path):
    torch.manual_seed(0)
    model, x = Mixer().eval(), torch.randn(16, 5, 32)
    quantized = _quantized(model, x)
    before = x.clone()
    outputs = []
    for factor in (1, 0.1):
        quantized.down.input_quantizer.scale.mul_(factor)
        folder = tmp_path / str(factor)
        folder.mkdir()
        lowered = lower(quantized, model, (x[:2],), folder, lambda m: m(x))
        assert lowered.layers_integer == ("up", "down")
        with torch.no_grad():
            real, fake = lowered.model(x), quantized(x)
        assert torch.equal(x, before)  # fused additions write to what they are given
        assert _difference(real - x, fake - x) < 0.02
        outputs.append(real - x)
    assert _difference(*outputs) > 0.1


@COMPILES
@pytest.mark.slow
def test_layers_without_an_integer_kernel_are_an_error_that_names_them(tmp_path):
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Flatten(), nn.Linear(32, 4)).eval()
    x = torch.randn(8, 2, 4, 4, 4)
    quantized = _quantized(model, x)
    with pytest.raises(VerificationError, match=r"inductor: 1 of 2 layers .* in float are 0$"):
        lower(quantized, model, (x[:2],), tmp_path, lambda m: m(x))
