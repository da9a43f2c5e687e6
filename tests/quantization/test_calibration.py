"""Scales and zero points in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_nets import call

from raycompress.errors import ArtifactError, ConfigError
from raycompress.quantization import (
    BNN,
    LSQ,
    PTQ,
    QAT,
    Bits,
    NaiveQuantizer,
    Quantizer,
    choices_of,
    export_calibration,
    load_calibration,
)
from raycompress.testing import ToyNet


def batch() -> Tensor:
    return torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def prepared(quantizer: Quantizer, calibrated: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ToyNet().eval()
    quantizer.prepare(model, choices_of(model, quantizer, (), (batch(),)))
    if calibrated:
        quantizer.calibrate(model, call, [batch()])
    return model


@pytest.mark.parametrize(
    "quantizer",
    [PTQ(), PTQ(per_channel=False, fold_norms=False), QAT(input_bits=4), LSQ(), NaiveQuantizer()],
)
def test_another_model_gets_the_same_grids(quantizer: Quantizer, tmp_path: Path) -> None:
    model = prepared(quantizer, calibrated=True)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # trained: no range is that of the weights
            if tensor.is_floating_point() and tensor.dim() < 2:
                tensor.mul_(1.01)
        expected = model(batch())
    export_calibration(model, tmp_path / "new" / "folder")
    other = prepared(quantizer)
    skip = ("scale", "zero_point", "low", "high", "step", "limits")
    rest = {k: v for k, v in model.state_dict().items() if k.rsplit(".")[-1] not in skip}
    kept = {k: v.clone() for k, v in other.state_dict().items()}
    with torch.no_grad():
        for key, value in other.state_dict().items():
            value.copy_(rest.get(key, kept[key]))
        load_calibration(other, tmp_path / "new" / "folder")
        assert torch.equal(other(batch()), expected)
        again = export_calibration(other, tmp_path / "again")
    for path in again:
        assert path.read_bytes() == (tmp_path / "new" / "folder" / path.name).read_bytes()
    fresh = prepared(quantizer)  # what was imported is in the state dict
    fresh.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(batch()), expected)


def test_one_scale_of_the_file_moves_the_output(tmp_path: Path) -> None:
    model = prepared(PTQ(), calibrated=True)
    _, path = export_calibration(model, tmp_path)
    tensors = load_file(path)
    tensors["fc.input.scale"] *= 2
    save_file(tensors, path)
    before = model(batch())
    load_calibration(model, tmp_path)
    assert model.fc.input_quantizer.scale == tensors["fc.input.scale"]
    assert not torch.equal(model(batch()), before)


def test_the_json_by_hand(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3)).eval()
    quantizer = PTQ(observer="minmax")
    quantizer.prepare(model, {"0": Bits(weight=4, input=8)})
    quantizer.calibrate(model, call, [torch.tensor([[-1.0, 254.0]])])
    plain, path = export_calibration(model, tmp_path)
    assert json.loads(plain.read_text())["layers"] == {
        "0": {
            "weight": {
                "bits": 4,
                "scheme": "symmetric",
                "low": -7,
                "high": 7,
                "shape": [3],
                "folded": False,
            },
            "input": {
                "bits": 8,
                "scheme": "affine",
                "low": 0,
                "high": 255,
                "shape": [],
                "folded": False,
            },
        }
    }
    tensors = load_file(path)
    assert tensors["0.input.scale"] == 1 and tensors["0.input.zero_point"] == 1
    assert torch.allclose(tensors["0.weight.scale"], model[0].weight.abs().amax(1) / 7)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PTQ(weight_bits=4), "the weight of 'conv1' has bits 8, the model's 4"),
        (PTQ(per_channel=False), r"the weight of 'conv1' has shape \[8\], the model's \[\]"),
        (PTQ(fold_norms=False), "the weight of 'conv1' has folded True, the model's False"),
        (NaiveQuantizer(per_channel=True), "the model has no input of 'conv1'"),
        (LSQ(weight_bits=8, activation_bits=8), "the weight of 'conv1' has low -127"),
    ],
)
def test_files_of_another_quantizer_are_refused(
    other: Quantizer, message: str, tmp_path: Path
) -> None:
    export_calibration(prepared(PTQ(), calibrated=True), tmp_path)
    model = prepared(other)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=message):
        load_calibration(model, tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_files_of_other_layers_are_refused(tmp_path: Path) -> None:
    quantizer, bits = PTQ(), Bits(weight=8)
    model = ToyNet().eval()
    quantizer.prepare(model, {"conv1": bits, "fc": bits})
    export_calibration(model, tmp_path)
    model = ToyNet().eval()
    quantizer.prepare(model, {"conv1": bits, "conv2": bits})
    with pytest.raises(
        ArtifactError, match=r"it has no layer 'conv2'; the model quantizes no.*'fc'"
    ):
        load_calibration(model, tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = prepared(PTQ(), calibrated=True)
    with pytest.raises(ArtifactError, match="holds no calibration: FileNotFoundError"):
        load_calibration(model, tmp_path)
    plain, path = export_calibration(model, tmp_path)
    whole = load_file(path)
    for key, value, message in (
        ("fc.input.scale", torch.tensor(-1.0), "fc.input: a scale isn't a finite number above 0"),
        ("fc.input.scale", torch.tensor(torch.nan), "a scale isn't a finite number"),
        ("fc.input.scale", torch.ones(2), r"fc.input: scale of shape \[2\], not \[\]"),
        ("fc.input.zero_point", torch.tensor(300), "a zero point is outside of 0 to 255"),
        ("fc.input.scale", None, "tensor 'fc.input.scale' is missing"),
    ):
        changed = {k: v for k, v in {**whole, key: value}.items() if v is not None}
        save_file(changed, path)
        with pytest.raises(ArtifactError, match=message):
            load_calibration(model, tmp_path)
    save_file(whole, path)
    text = plain.read_text()
    for other in ("[]", "{", '{"format": 3, "layers": {}}', text.replace("layers", "other")):
        plain.write_text(other)
        with pytest.raises(ArtifactError, match=r"holds no calibration|of format 3"):
            load_calibration(model, tmp_path)
    plain.write_text(text)
    path.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="holds no calibration"):
        load_calibration(model, tmp_path)


def test_what_has_no_scales_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model isn't quantized"):
        export_calibration(ToyNet(), tmp_path)
    with pytest.raises(ConfigError, match="the input of 'conv1' has no range"):
        export_calibration(prepared(PTQ()), tmp_path)
    with pytest.raises(ConfigError, match="the weight of 'conv2' has no scale: a SignWeight"):
        export_calibration(prepared(BNN()), tmp_path)
    assert not list(tmp_path.iterdir())
