"""`Quantizer.quantize`: a model in, a quantized copy out, without a job."""

from __future__ import annotations

import copy
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from raycompress.errors import ConfigError, StructureError, TaskError, VerificationError
from raycompress.method import TrainingMethod, TrainingRun
from raycompress.quantization import BNN, LSQ, QAT, DoReFa, NaiveQuantizer
from raycompress.quantization.fake_quant import quantizers_of
from raycompress.quantization.layers import quantized_layers
from raycompress.quantization.lowering import lowering
from raycompress.quantization.lowering.lowered import Lowered
from raycompress.quantization.qat import fold_norms
from raycompress.quantization.quantizer import Bits, Quantizer
from raycompress.task import Split
from raycompress.testing import ToyTask

TASK = ToyTask(num=320)


@cache
def trained() -> nn.Module:
    model = TASK.build_model()
    TASK.train(model, epochs=5, lr=0.1)
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TASK.dataset("test").tensors[0])
    return found


def accuracy(model: nn.Module) -> float:
    batch = TASK.dataset("test").tensors
    return float(TASK.score(outputs(model), batch).mean())


@pytest.mark.parametrize(
    ("quantizer", "epochs"),
    [
        (NaiveQuantizer(), 0),
        (QAT(), 0),
        (QAT(), 1),
        (QAT(fold_norms=False), 1),
        (LSQ(weight_bits=8, activation_bits=8), 1),
    ],
)
def test_eight_bits_keep_the_accuracy_and_leave_the_model(quantizer, epochs):
    model = trained()
    before = copy.deepcopy(model.state_dict())
    quantized = quantizer.quantize(model, TASK, epochs=epochs, lr=0.01)
    assert accuracy(model) > 0.8  # of three classes
    assert accuracy(quantized) > accuracy(model) - 0.02
    assert not torch.equal(outputs(quantized), outputs(model))
    assert not any(module.training for module in quantized.modules())
    assert set(quantized_layers(quantized)) == {"conv1", "conv2", "conv3", "fc"}
    assert not quantized_layers(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    moved = not torch.equal(quantized.conv1.weight, model.conv1.weight)
    assert moved == (epochs > 0)


def test_config_list_is_honoured():
    entries = [
        {"op_types": ["Conv2d"], "quant_bits": {"weight": 3, "input": 5}},
        {"op_names": ["conv2"], "quant_types": ["weight"]},
        {"op_names": ["conv1"], "exclude": True},
        {"op_names": ["fc"], "quant_bits": {"weight": 8, "input": 32}},  # 32: float
    ]
    layers = quantized_layers(QAT().quantize(trained(), TASK, entries))
    assert set(layers) == {"conv2", "conv3", "fc"}
    assert layers["fc"].input_quantizer is None and layers["fc"].weight_quantizer.bits == 8
    assert layers["conv2"].input_quantizer is None and layers["conv2"].weight_quantizer.bits == 8
    assert layers["conv3"].input_quantizer.bits == 5
    for channel in layers["conv3"].quantized_weight():
        assert len(channel.unique()) <= 7  # -3 to 3


def test_a_delay_ends_within_the_training():
    entries = [{"op_types": ["default"], "quant_start_step": 9}]
    quantized = QAT().quantize(trained(), TASK, entries, epochs=1)  # of 10 steps
    assert all(each.seen == 10 and each.active for each in quantizers_of(quantized))


def test_training_runs_within_the_methods_of_the_quantizer():
    layer = QAT(fold_norms=False).quantize(trained(), TASK, epochs=0.5).conv1
    largest = layer.weight.detach().abs().amax(dim=(1, 2, 3))  # after the last step
    assert torch.allclose(layer.weight_quantizer.scale, largest / 127)


def test_the_rate_is_that_of_the_training():
    before = trained().conv1.weight
    small, own = (
        (QAT().quantize(trained(), TASK, epochs=0.5, lr=lr).conv1.weight - before).abs().max()
        for lr in (1e-6, None)
    )
    assert 0 < small < 1e-4 < own


@dataclass(frozen=True, kw_only=True)
class Imitate(TrainingMethod):
    """Trains on the float model's outputs, in place of labels."""

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        teacher = run.build("")

        def loss(found: Tensor, batch: Any) -> Tensor:
            with torch.no_grad():
                wanted = teacher(batch[0])
            return nn.functional.mse_loss(found, wanted)

        run.task.loss = loss
        yield


@dataclass(frozen=True, kw_only=True)
class Distilled(LSQ):
    """A quantizer of the user's own."""

    def methods(self, model: nn.Module) -> tuple[TrainingMethod, ...]:
        return (*super().methods(model), Imitate())


def test_a_quantizer_of_the_users_own():
    few = {"weight_bits": 2, "activation_bits": 2}
    before = Distilled(**few).quantize(trained(), TASK)
    after = Distilled(**few).quantize(trained(), TASK, epochs=3)
    other = LSQ(**few).quantize(trained(), TASK, epochs=3)
    far, near, labels = (
        (outputs(model) - outputs(trained())).square().mean() for model in (before, after, other)
    )
    assert near < far / 2 and near < labels
    assert "loss" not in vars(TASK)  # what a method replaces is the run's own


@pytest.mark.parametrize(
    ("quantizer", "epochs"), [(QAT(weight_bits=4), 0.5), (DoReFa(gradient_bits=6), 0.5)]
)
def test_the_same_seed_gives_the_same_model(quantizer, epochs):
    first, again, other = (
        quantizer.quantize(trained(), TASK, epochs=epochs, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


class NoData(ToyTask):
    def dataset(self, split: Split) -> TensorDataset:
        data = super().dataset(split)
        return TensorDataset(*data[:0]) if split == "calibration" else data

    def train(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("training started")


class BrokenData(NoData):
    def dataset(self, split: Split) -> TensorDataset:
        if split == "calibration":
            raise KeyError("calibration")
        return super().dataset(split)


def says(text: str) -> str:
    return f"^{re.escape(text)}$"


KINDS = "Linear, Conv1d, Conv2d, Conv3d"


@pytest.mark.parametrize(
    ("quantizer", "entries", "epochs", "text"),
    [
        (
            QAT(),
            [{"quant_bit": 8}],
            1,
            "config_list[0]: no key 'quant_bit'; did you mean 'quant_bits' or 'quant_types'?; "
            "allowed: op_types, op_names, op_names_re, exclude, quant_types, quant_bits, "
            "quant_start_step",
        ),
        (
            QAT(),
            [{"op_types": ["Conv2d"], "quant_bits": 9}],
            1,
            "config_list[0]: quant_bits must be between 1 and 8 (32: float), got 9",
        ),
        (
            QAT(),
            [{"op_types": ["Conv2d"], "quant_bits": 1}],
            1,
            "bits of the weight of 'conv1' must be an integer between 2 and 8, got 1; BNN and "
            "DoReFa have one bit",
        ),
        (
            QAT(),
            [{"op_types": ["Conv2d"], "quant_start_step": 1.5}],
            1,
            "config_list[0]: quant_start_step must be an integer, 0 or more, got 1.5",
        ),
        (
            QAT(),
            [{"op_types": ["BatchNorm2d"]}],
            1,
            f"config_list[0].op_types: BatchNorm2d can't be quantized; those that can are {KINDS}",
        ),
        (
            QAT(quant_start_step=3),
            [],
            1,
            "quant_start_step 3 of 'conv1' is beyond the training, which has 3 steps; train longer "
            "or start earlier",
        ),
        (
            QAT(),
            [{"op_names": ["fc"], "quant_start_step": 1}],
            0,
            "quant_start_step 1 of 'fc' is beyond the training, which has 0 steps; train longer "
            "or start earlier",
        ),
        (
            QAT(),
            [],
            0,
            "QAT without training needs calibration data: NoData.dataset('calibration') is empty",
        ),
        (BNN(), [], 0, "BNN has to be trained: epochs must be above 0, got 0"),
        (NaiveQuantizer(), [], 1, "NaiveQuantizer isn't trained: epochs must be 0, got 1"),
        (QAT(), None, 1, "config_list must be a list of entries, got None; write [{...}]"),
        (QAT(), [], -1, "epochs must be a number, 0 or more, got -1"),
        (QAT(), [], float("nan"), "epochs must be a number, 0 or more, got nan"),
        (QAT(), [], "1", "epochs must be a number, 0 or more, got '1'"),
    ],
)
def test_errors_come_before_training(quantizer, entries, epochs, text):
    task = NoData()
    with pytest.raises(ConfigError, match=says(text)):
        quantizer.quantize(task.build_model(), task, entries, epochs=epochs)


def test_errors_of_the_other_arguments():
    task, model = NoData(), trained()
    text = "the model doesn't run on the example inputs: RuntimeError: "
    with pytest.raises(StructureError, match=text):
        QAT().quantize(nn.Sequential(nn.Linear(7, 3)), task)
    frozen = copy.deepcopy(model).requires_grad_(False)
    text = "epochs 1: no parameter of the model requires a gradient"
    with pytest.raises(ConfigError, match=says(text)):
        QAT().quantize(frozen, task, epochs=1)
    with pytest.raises(ConfigError, match=says("lr must be a number above 0, got 0")):
        QAT().quantize(model, task, epochs=1, lr=0)
    with pytest.raises(ConfigError, match="device 'nowhere' can't be used here: "):
        QAT().quantize(model, task, device="nowhere")
    with pytest.raises(TaskError, match=r"task must be an instance of .*Task, got 'toy'"):
        QAT().quantize(model, "toy")
    text = "BrokenData.dataset('calibration') can't be read: KeyError: 'calibration'"
    with pytest.raises(TaskError, match=says(text)):
        QAT().quantize(model, BrokenData())


def test_training_alone_sets_ranges_where_there_is_no_calibration_data():
    class Trains(NoData):
        train = ToyTask.train

    quantized = QAT().quantize(trained(), Trains(num=64), epochs=1)
    assert all(each.ready for each in quantizers_of(quantized))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(12, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = self.lstm(x.transpose(1, 2).flatten(2))  # 6 rows of 12 numbers
        logits: Tensor = self.fc(rows[:, -1])
        return logits


class RecurrentTask(ToyTask):
    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Recurrent()


def test_recurrent_layers_are_named(caplog):
    task = RecurrentTask()
    model = task.build_model().eval()
    text = "'lstm' is of type LSTM, which can't be quantized; those that can are " + KINDS
    with pytest.raises(ConfigError, match=says(f"config_list[0].op_names: {text}")):
        QAT().quantize(model, task, [{"op_names": ["lstm"]}])
    text = f"config_list[0].op_types: LSTM can't be quantized; those that can are {KINDS}"
    with pytest.raises(ConfigError, match=says(text)):
        QAT().quantize(model, task, [{"op_types": ["LSTM"]}])
    with caplog.at_level(logging.WARNING):
        quantized = QAT().quantize(model, task, epochs=1)
    assert set(quantized_layers(quantized)) == {"fc"}
    expected = "in float, since their types can't be quantized: 'lstm' (LSTM)"
    assert [record.getMessage() for record in caplog.records] == [expected]


SAVED: list[Quantizer] = [NaiveQuantizer(per_channel=True), QAT(), LSQ()]


def test_state_dicts_load_in_another_process(tmp_path):
    made = [each.quantize(trained(), TASK, epochs=each.trains != "no") for each in SAVED]
    torch.save([(m.state_dict(), outputs(m)) for m in made], tmp_path / "saved.pt")
    code = (
        "import sys; sys.path.insert(0, 'tests/quantization')\n"
        "import torch\n"
        "from test_quantize_call import SAVED, TASK, outputs\n"
        "from raycompress.quantization import choices_of\n"
        "saved = torch.load(sys.argv[1], weights_only=True)\n"
        "for quantizer, (state, expected) in zip(SAVED, saved, strict=True):\n"
        "    model = TASK.build_model().eval()\n"
        "    quantizer.prepare(model, choices_of(model, quantizer, (), TASK.example_inputs()))\n"
        "    model.load_state_dict(state)\n"
        "    assert torch.equal(outputs(model), expected), quantizer\n"
        "print('same')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved.pt")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "same\n", done.stderr


@pytest.mark.parametrize("per_channel", [True, False])
def test_channels_that_a_norm_multiplies_by_zero_fold(per_channel):
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.bn1.weight[[0, 3]] = 0
        model.bn2.weight.zero_()
    quantized = QAT(per_channel=per_channel).quantize(model, TASK).double()
    folded = fold_norms(quantized)  # in double, so that no rounding goes another way
    assert isinstance(folded.bn1, nn.Identity)
    assert not folded.conv1.quantized_weight()[[0, 3]].any()
    assert not folded.conv2.quantized_weight().any()
    images = TASK.dataset("test").tensors[0].double()
    with torch.no_grad():
        expected, found = quantized(images), folded(images)
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() < 1e-10


def test_one_grid_for_a_layer_has_the_range_of_its_folded_weight():
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.conv1.weight[0] *= 1000  # counts for nothing: its norm multiplies it by 0
        model.bn1.weight[0] = 0
    layer = QAT(per_channel=False).quantize(model, TASK).conv1
    factor = model.bn1.weight / torch.sqrt(model.bn1.running_var + model.bn1.eps)
    largest = (model.conv1.weight * factor.view(-1, 1, 1, 1)).abs().max()
    assert torch.allclose(layer.weight_quantizer.scale, largest / 127)


def lowered(**fields: Any) -> Lowered:
    return Lowered(
        backend="onnx",
        model=nn.Identity(),
        reference=nn.Identity(),
        path=Path("model.onnx"),
        file_bytes=1,
        reference_bytes=1,
        **fields,
    )


def test_fewer_integer_layers_than_asked_for_are_an_error():
    asked = ("conv1", "conv2", "fc")
    lowered(layers_asked=asked, layers_integer=asked).check()
    lowered(layers_asked=asked, layers_integer=(), runs="simulation").check()
    text = "onnx: 1 of 3 layers run in integers; in float are conv1, fc"
    with pytest.raises(VerificationError, match=says(text)):
        lowered(layers_asked=asked, layers_integer=("conv2",)).check()


def test_a_backend_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^quantize\.lower must be one of .*none, got 'tpu'$"):
        lowering("tpu", "quantize.lower")


def test_bits_are_those_that_were_asked_for():
    choices = {name: Bits(weight=8) for name in ("conv1", "fc")}
    model = copy.deepcopy(trained())
    NaiveQuantizer().prepare(model, choices)
    entries = [{"op_names": ["conv1", "fc"], "quant_bits": 8}]
    assert torch.equal(outputs(model), outputs(NaiveQuantizer().quantize(trained(), TASK, entries)))
