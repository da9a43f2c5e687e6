import pytest
import torch
from torch import nn

from raycompress.errors import ConfigError
from raycompress.quantization.norms import norms_behind
from raycompress.quantization.qat import QAT, FoldedWeight, fold_norms
from raycompress.quantization.quantizer import Bits
from raycompress.quantization.targets import QuantTarget, choices_of
from raycompress.testing import ToyNet


def _trained_norms(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def test_norms_that_alone_read_a_layer():
    found = norms_behind(ToyNet(), (torch.zeros(2, 2, 6, 6),))
    assert found == {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert norms_behind(Twice(), (torch.zeros(2, 2, 6, 6),)) == {}


@pytest.mark.parametrize("per_channel", [True, False])
def test_folded_layers_compute_what_layer_and_norm_do(per_channel):
    torch.manual_seed(0)
    model = _trained_norms(ToyNet()).double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    quantizer = QAT(per_channel=per_channel)
    choices = choices_of(model, quantizer, (), (x,))
    quantizer.prepare(model, choices)
    model.double().eval()
    quantizer.calibrate(model, lambda m, batch: m(batch), [x])
    folded = fold_norms(model)
    assert isinstance(folded.bn1, nn.Identity) and isinstance(model.bn1, nn.BatchNorm2d)
    with torch.no_grad():
        assert (folded(x) - model(x)).abs().max() < 1e-10
        for name in ("conv1", "conv3"):  # what is rounded is the folded weight
            layer = model.get_submodule(name)
            assert isinstance(layer.weight_quantizer, FoldedWeight)
            used = folded.get_submodule(name).quantized_weight()
            scale = (
                layer.weight_quantizer.scale.view(-1, 1, 1, 1)
                if per_channel
                else (layer.weight_quantizer.scale)
            )
            steps = used / scale
            assert (steps - steps.round()).abs().max() < 1e-9 and steps.abs().max() <= 127.000001


def test_config_list():
    model, x = ToyNet(), (torch.zeros(2, 2, 6, 6),)
    entries = (
        QuantTarget(op_types=("Conv2d",), quant_bits={"weight": 4, "input": 8}),
        QuantTarget(op_names=("conv2",), quant_types=("weight",), quant_start_step=7),
        QuantTarget(op_names=("conv1",), exclude=True),
    )
    assert choices_of(model, QAT(), entries, x) == {
        "conv2": Bits(weight=8, start_step=7, norm="bn2"),
        "conv3": Bits(weight=4, input=8, norm="bn3"),
    }
    left = choices_of(model, QAT(), (QuantTarget(op_names=("fc",), exclude=True),), x)
    assert set(left) == {"conv1", "conv2", "conv3"}
    with pytest.raises(ConfigError, match="'bn1' is of type BatchNorm2d, which can't be quantized"):
        choices_of(model, QAT(), (QuantTarget(op_names=("bn1",)),), x)
    with pytest.raises(ConfigError, match=r"quant_bits\.input must be between 1 and 8"):
        QuantTarget(op_types=("Conv2d",), quant_bits={"input": 9})


@pytest.mark.parametrize("per_channel", [True, False])
def test_int32_arithmetic_comes_to_the_same_within_a_step(per_channel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 6)).eval()
    x = torch.randn(50, 20)
    quantizer = QAT(per_channel=per_channel)
    quantizer.prepare(model, {"0": Bits(weight=8, input=8, output=8)})
    quantizer.calibrate(model, lambda m, batch: m(batch), [x])
    layer = model[0]
    weight, inputs, outputs = (
        getattr(layer, f"{part}_quantizer").grid for part in ("weight", "input", "output")
    )
    # S_bias = S_weight * S_input, Z_bias = 0 (section 2.4)
    step = weight.scale.double() * inputs.scale.double()
    bias = torch.round(layer.bias.double() / step).to(torch.int32)
    q_x, q_w = inputs.integers(x) - inputs.zero_point, weight.integers(layer.weight)
    assert q_w.min() >= -127
    total = q_x @ q_w.T + bias
    assert total.dtype == torch.int32
    ratio = step / outputs.scale.double()
    integers = (torch.round(total * ratio) + outputs.zero_point).clamp(0, 255)
    with torch.no_grad():
        simulated = outputs.integers(model(x))
    difference = (integers - simulated).abs()
    assert difference.max() <= 1 and (difference == 0).float().mean() > 0.9


def test_training_starts_to_round_after_the_delay_and_keeps_master_weights():
    torch.manual_seed(0)
    model, plain = nn.Sequential(nn.Linear(5, 3)), nn.Linear(5, 3)
    model[0].load_state_dict(plain.state_dict())
    QAT().prepare(model, {"0": Bits(weight=8, input=8, start_step=2)})
    x = torch.randn(10, 5)
    model.train()
    assert torch.equal(model(x), plain(x)) and torch.equal(model(x), plain(x))
    assert not torch.equal(model(x), plain(x))
    assert torch.equal(model[0].weight, plain.weight)
