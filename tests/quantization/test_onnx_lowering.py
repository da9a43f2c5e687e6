import copy
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from raycompress.artifacts.onnx import OnnxModel
from raycompress.errors import ConfigError, TaskError, VerificationError
from raycompress.quantization import LSQ, QAT, Bits, DoReFa, NaiveQuantizer, choices_of
from raycompress.quantization.layers import quantized_layers
from raycompress.quantization.lowering import lowering
from raycompress.quantization.lowering.graph import integer_program
from raycompress.quantization.lowering.onnx import lower

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Residual(nn.Module):
    def __init__(self, c=16):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c)
        self.conv1, self.norm1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.norm2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.depthwise = nn.Conv2d(c, c, 3, groups=c, padding="same")
        self.grouped = nn.Conv2d(c, 2 * c, 1, groups=4)
        self.fc = nn.Linear(2 * c, 10)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = functional.max_pool2d(self.relu(self.stem_norm(self.stem(x))), 2)
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        y = self.relu(y)
        y = functional.relu6(self.grouped(functional.relu6(self.depthwise(y))))
        return self.fc(y.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm, self.up, self.down = (
            nn.LayerNorm(d),
            nn.Linear(d, 64, bias=False),
            nn.Linear(64, d),
        )

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return (x + self.down(functional.gelu(self.up(x)))).mean(1)


class Joined(nn.Module):
    """Two branches, one to be joined with the other; a layer that runs twice; two answers."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.twice, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y = torch.cat([self.left(x), functional.relu(self.right(x))], 1)
        y = functional.hardtanh(self.twice(functional.relu(self.twice(y))))
        return {"map": self.last(y), "sum": y.sum((1, 2, 3))}


def _plain():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 9, 10)),
    )


def _mlp():
    return nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)
    )


def _signal():
    return nn.Sequential(
        *(nn.Conv1d(4, 16, 5, padding="same"), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(16, 16, 4, padding="same", padding_mode="circular"), nn.Hardtanh()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


def _volume():
    first = nn.Conv3d(2, 8, 3, padding=1, padding_mode="reflect")
    return nn.Sequential(first, nn.ReLU(), nn.Conv3d(8, 4, 3))


NETS = {
    "plain": (_plain, (3, 16, 16)),
    "residual": (Residual, (3, 16, 16)),
    "mlp": (_mlp, (20,)),
    "attention": (Attention, (7, 32)),
    "signal": (_signal, (4, 20)),
    "volume": (_volume, (2, 6, 6, 6)),
    "joined": (Joined, (3, 8, 8)),
}
QUANTIZERS = {
    "qat": QAT(),
    "plain": QAT(fold_norms=False, per_channel=False),
    "lsq": LSQ(weight_bits=8, activation_bits=8),
}


def _trained_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape))
    return model.eval()


def _quantized(model, quantizer, x, choices=None):
    model = copy.deepcopy(model)
    choices = choices or choices_of(model, quantizer, (), (x[:2],))
    quantizer.prepare(model, choices)
    quantizer.calibrate(model, lambda m, batch: m(batch), [x])
    return model.eval()


def _lowered(model, quantizer, x, folder, choices=None):
    quantized = _quantized(model, quantizer, x, choices)
    return quantized, lower(quantized, model, (x[:2],), folder, lambda m: m(x))


CASES = [("plain", "qat"), ("residual", "qat"), ("joined", "qat")]
SLOW = [
    *((net, "qat") for net in ("mlp", "attention", "signal", "volume")),
    *(("residual", "plain"), ("residual", "lsq"), ("attention", "lsq")),
]


@pytest.mark.parametrize(
    ("net", "how"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_all_layers_run_in_integers_and_agree_with_fake_quantization(net, how, tmp_path):
    torch.manual_seed(0)
    make, shape = NETS[net]
    model, x = _trained_norms(make()), torch.randn(64, *shape)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantized, lowered = _lowered(model, QUANTIZERS[how], x, tmp_path)
    assert lowered.layers_integer == lowered.layers_asked == tuple(quantized_layers(quantized))
    assert lowered.runs == "integers" and lowered.fixed_batch == ""
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    other = x[:51]  # within the ranges; another batch size
    with torch.no_grad():
        fake, real, whole = quantized(other), lowered.model(other), model(other)
        reference = lowered.reference(other)
    if net == "joined":
        assert list(real) == list(fake)
        fake, real, whole, reference = (a["map"] for a in (fake, real, whole, reference))
    assert real.shape == fake.shape
    assert (reference - whole).abs().max() < 1e-4 * whole.abs().max()
    assert (real - fake).abs().mean() < 0.02 * fake.std()
    assert (real - fake).abs().max() < 0.15 * fake.std()
    same = real.argmax(1) == fake.argmax(1)
    assert same.float().mean() >= 0.95


def test_fp32_is_farther_from_integers_than_fake_quantization_is(tmp_path):
    torch.manual_seed(0)
    model, x = _mlp().eval(), torch.randn(64, 20)
    quantized, lowered = _lowered(model, QAT(), x, tmp_path)
    with torch.no_grad():
        real, fake, whole = lowered.model(x), quantized(x), model(x)
    assert (real - fake).abs().mean() * 10 < (real - whole).abs().mean()


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("how", ["qat", "lsq"])
def test_a_convolution_is_within_one_step_of_its_output(groups, how, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups)).eval(), torch.randn(32, 8, 6, 6)
    quantized, lowered = _lowered(model, QUANTIZERS[how], x, tmp_path)
    with torch.no_grad():
        fake, real = quantized(x), lowered.model(x)
    step = (fake.max() - fake.min()) / 255
    assert (real - fake).abs().max() < 1.01 * step
    assert len(torch.unique(real)) <= 256


def test_integers_in_plain_torch_come_to_the_same(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2))
    model, x = model.eval(), torch.randn(16, 4, 9, 9)
    quantized, lowered = _lowered(model, QAT(), x, tmp_path)
    first, second = quantized[0], quantized[2]
    out = _grids(tmp_path / "quantized.onnx")[-1]

    def convolve(q, layer, padding, stride):
        grid, weights = layer.input_quantizer.grid, layer.weight_quantizer.grid
        integers = weights.integers(layer.weight).double()
        scale = weights.scale * grid.scale
        bias = torch.round(layer.bias / scale)
        y = functional.conv2d(
            q.double() - grid.zero_point, integers, bias.double(), stride, padding
        )
        assert y.abs().max() < 2**31
        return y * scale.view(-1, 1, 1)

    q0 = first.input_quantizer.grid.integers(x)
    q1 = second.input_quantizer.grid.integers(convolve(q0, first, 1, 1).relu())
    scale, zero = out
    expected = (torch.round(convolve(q1, second, 0, 2) / scale) + zero).clamp(0, 255)
    got = torch.round(lowered.model(x).double() / scale) + zero
    assert (got - expected).abs().max() <= 1
    assert (got == expected).double().mean() > 0.999


def _grids(path):
    """Scale and zero point of each QuantizeLinear in a file, in order."""
    graph = onnx.load(path).graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return [
        (float(values[n.input[1]]), int(values[n.input[2]]))
        for n in graph.node
        if n.op_type == "QuantizeLinear"
    ]


def test_one_changed_scale_changes_what_integers_come_to(tmp_path):
    torch.manual_seed(0)
    model, x = _mlp().eval(), torch.randn(64, 20)
    quantized = _quantized(model, QAT(), x)
    answers = []
    for part in ("none", "input_quantizer", "weight_quantizer"):
        changed = copy.deepcopy(quantized)
        if part != "none":
            getattr(changed[2], part).scale.mul_(0.5)
        lowered = lower(changed, model, (x[:2],), tmp_path, lambda m: m(x))
        answers.append(lowered.model(x))
        with torch.no_grad():
            assert (answers[-1] - changed(x)).abs().mean() < 2e-3
    for changed in answers[1:]:
        assert (changed - answers[0]).abs().mean() > 4e-3
    found = _grids(lowered.path)
    for index in (0, 2, 4):  # to the last bit
        grid = quantized[index].input_quantizer.grid
        assert (float(grid.scale), int(grid.zero_point)) in found


def test_the_file_is_small_and_runs_without_raycompress(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 10)),
    )
    model, x = _trained_norms(model), torch.randn(32, 3, 8, 8)
    _, lowered = _lowered(model, QAT(), x, tmp_path)
    assert lowered.file_bytes == lowered.path.stat().st_size
    assert lowered.file_bytes <= 0.3 * lowered.reference_bytes
    weights = {i.name: i.data_type for i in onnx.load(lowered.path).graph.initializer if i.dims}
    for name in lowered.layers_asked:
        assert weights[f"{name}.weight"] == onnx.TensorProto.INT8
        assert weights[f"{name}.bias"] == onnx.TensorProto.INT32
    assert b"File " not in lowered.path.read_bytes()  # no notes on where in whose source
    text = str(lowered.path)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy, onnxruntime as o\n"
        f"s = o.InferenceSession({text!r}, providers=['CPUExecutionProvider'])\n"
        f"y = s.run(None, {{s.get_inputs()[0].name: numpy.load({str(tmp_path / 'x.npy')!r})}})\n"
        f"numpy.save({str(tmp_path / 'y.npy')!r}, y[0])\n"
        "assert 'torch' not in sys.modules and 'raycompress' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "y.npy"), lowered.model(x).numpy())


def test_points_of_their_own_only_where_values_are_read_in_float(tmp_path):
    torch.manual_seed(0)
    found = {}
    for name in ("plain", "residual", "mlp"):
        make, shape = NETS[name]
        x = torch.randn(16, *shape)
        quantized = _quantized(_trained_norms(make()), QAT(), x)
        made = integer_program(quantized, (x[:2],), lambda m, x=x: m(x), int32_bias=True)
        found[name] = made.points
        if name == "plain":  # nothing but the bias differs
            made = integer_program(quantized, (x[:2],), lambda m, x=x: m(x), int32_bias=False)
            with torch.no_grad():
                error = (made.program.module()(x) - quantized(x)).abs()
            assert error.mean() < 1e-4 * quantized(x).std()
    # conv2 before the addition, grouped before the mean.
    assert found == {"plain": 0, "residual": 2, "mlp": 0}


def test_a_bias_beyond_int32_makes_its_channel_coarser(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(32, 8)
    with torch.no_grad():
        model[0].weight[1] *= 1e-12
        model[0].bias[1] = 3.0
    _, lowered = _lowered(model, QAT(), x, tmp_path)
    real = lowered.model(x)
    assert (real[:, 1] - 3).abs().max() < 1e-5
    with torch.no_grad():
        assert (real - model(x)).abs().max() < 0.05


class Unused(nn.Module):
    """One of its layers only runs in training."""

    def __init__(self):
        super().__init__()
        self.body, self.aside, self.head = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.head(self.body(x))
        return y + self.aside(x) if self.training else y


def test_layers_that_stay_in_float_are_an_error_that_names_them(tmp_path):
    model, x = Unused(), torch.randn(16, 6)
    quantized = copy.deepcopy(model)
    QAT().prepare(quantized, choices_of(quantized, QAT(), (), (x,)))
    QAT().calibrate(quantized.train(), lambda m, batch: m(batch), [x])
    with pytest.raises(
        VerificationError, match=r"2 of 3 layers run in integers; in float are aside"
    ):
        lower(quantized.eval(), model.eval(), (x[:2],), tmp_path, lambda m: m(x))


def test_an_unquantized_layer_may_stay_in_float(tmp_path):
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(32, 3, 16, 16)
    choices = {
        "conv1": Bits(weight=8, input=8),
        "grouped": Bits(weight=8),
        "fc": Bits(weight=8, input=8, output=8),
    }
    quantized, lowered = _lowered(model, QAT(fold_norms=False), x, tmp_path, choices)
    assert lowered.layers_integer == ("conv1", "fc")
    with torch.no_grad():
        fake = quantized(x)
        assert (lowered.model(x) - fake).abs().mean() < 0.05 * fake.std()


class Between(nn.Module):
    """Layers that are to stay in float, each between quantized ones."""

    def __init__(self):
        super().__init__()
        self.first, self.plain = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.second, self.pooled = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.norm, self.third = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.up, self.fourth = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(8, 8, 1)
        self.flat, self.last = nn.Linear(8 * 16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = functional.relu(self.plain(functional.relu(self.first(x))))
        x = self.norm(self.pooled(functional.max_pool2d(functional.relu(self.second(x)), 2)))
        x = self.up(functional.relu(self.third(functional.relu(x))))
        x = functional.max_pool2d(functional.relu(self.fourth(x)), 3)
        return self.last(functional.relu(self.flat(x.flatten(1))))


def test_layers_between_quantized_ones_stay_in_float(tmp_path, monkeypatch):
    """onnxruntime would round their weights by itself: here to next to nothing."""
    torch.manual_seed(0)
    model, x = _trained_norms(Between()).eval(), torch.randn(32, 3, 16, 16)
    floats = ("plain", "pooled", "up", "flat")
    with torch.no_grad():
        for name in floats:  # one large weight: with one scale for all, most others are lost
            model.get_submodule(name).weight[0, 0] *= 300
    rounded = ("first", "second", "third", "fourth", "last")
    choices = {name: Bits(weight=8, input=8) for name in rounded}
    quantized, lowered = _lowered(model, QAT(), x, tmp_path, choices)
    assert set(lowered.layers_integer) == set(rounded)
    OnnxModel(lowered.path, None, tmp_path / "runs.onnx")
    runs = onnx.load(tmp_path / "runs.onnx").graph
    kinds = [node.op_type for node in runs.node]
    assert kinds.count("QLinearConv") == 4 and kinds.count("QGemm") == 1
    assert sum(kinds.count(kind) for kind in ("Conv", "ConvTranspose", "Gemm", "FusedGemm")) == 4
    with torch.no_grad():
        fake = quantized(x)
        off = float((lowered.model(x) - fake).abs().mean() / fake.abs().mean())
    assert off < 0.05  # 0.52 where onnxruntime rounds them
    monkeypatch.setattr("raycompress.quantization.lowering.onnx._keep_in_float", lambda _: None)
    with pytest.raises(VerificationError):
        _lowered(model, QAT(), x, tmp_path, choices)
    model = _trained_norms(Between()).eval()  # without large weights nothing else would notice
    with pytest.raises(VerificationError, match="in integers, which is to stay in float"):
        _lowered(model, QAT(), x, tmp_path, choices)


def test_what_kernels_do_not_have_is_refused(tmp_path):
    model, x = _mlp().eval(), torch.randn(16, 20)

    def refused(quantizer, error, match, choices=None):
        quantized = copy.deepcopy(model)
        quantizer.prepare(quantized, choices or quantizer.choose(quantized))
        quantizer.calibrate(quantized, lambda m, batch: m(batch), [x])
        with pytest.raises(error, match=match):
            lower(quantized.eval(), model, (x[:2],), tmp_path, lambda m: m(x))

    refused(
        QAT(weight_bits=4),
        ConfigError,
        r"the weight of '0' has 4 bits; kernels have 8\. Lower to packed instead",
    )
    refused(LSQ(), ConfigError, r"the weight of '2' has 4 bits; kernels have 8\. Lower to packed")
    refused(
        DoReFa(),
        ConfigError,
        r"the weight of '2' isn't quantized to a scale and a zero point .*lower to packed",
    )
    refused(NaiveQuantizer(), ConfigError, "none has 8 bits for both its weight and its input")
    assert not list(tmp_path.iterdir())
    quantized = copy.deepcopy(model)
    QAT().prepare(quantized, QAT().choose(quantized))
    with pytest.raises(TaskError, match="the input of '0' has no range yet: calibrate or train"):
        lower(quantized.eval(), model, (x[:2],), tmp_path, lambda m: m(x))


def test_outputs_without_calibration_data_are_refused(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(4, 3, 8, 8)
    quantized = _quantized(model, QAT(), x)
    with pytest.raises(TaskError, match="the calibration data gave none"):
        lower(quantized, model, (x[:2],), tmp_path, lambda m: None)


def test_a_runtime_that_computes_something_else_is_found():
    torch.manual_seed(0)
    model, x = _mlp().eval(), torch.randn(16, 20)
    quantized = _quantized(model, QAT(), x)
    made = integer_program(quantized, (x[:2],), lambda m: m(x), int32_bias=True)
    made.compare(made.program.module(), "torch")
    with pytest.raises(VerificationError, match="torch computes something else"):
        made.compare(lambda x: 1.1 * made.program.module()(x), "torch")


def test_backends_by_name(monkeypatch):
    assert lowering("onnx") is lower
    with pytest.raises(ConfigError, match=r"quantize\.lower must be one of onnx.*got 'onx'"):
        lowering("onx", "quantize.lower")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"lowering to onnx needs the extra `onnx`"):
        lowering("onnx")


def test_answers_of_one_file_are_the_same_each_time(tmp_path):
    torch.manual_seed(0)
    model, x = _plain().eval(), torch.randn(16, 3, 16, 16)
    _, lowered = _lowered(model, QAT(), x, tmp_path)
    again = OnnxModel(lowered.path)(x)
    assert torch.equal(again[0], lowered.model(x))
