"""DoReFa, BNN and LSQ trained: in other processes, exported, by seed; beside their contract."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from raycompress.method import TrainingRun
from raycompress.quantization.bnn import BNN
from raycompress.quantization.dorefa import DoReFa
from raycompress.quantization.lsq import LSQ
from raycompress.quantization.quantizer import Quantizer
from raycompress.structure import Structure
from raycompress.testing import ToyTask


class HardtanhTask(ToyTask):
    """The toy task with a net in whose inner layers inputs have both signs."""

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.Hardtanh(),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.Hardtanh(),
                nn.Flatten(),
                nn.Linear(8 * 36, 3),
            )


ALL = [
    DoReFa(weight_bits=1, activation_bits=2, gradient_bits=6),
    DoReFa(weight_bits=3, activation_bits=4),
    BNN(first="weights"),
    LSQ(weight_bits=3, activation_bits=3),
]
each = pytest.mark.parametrize("quantizer", ALL, ids=lambda q: f"{type(q).__name__}{ALL.index(q)}")


def prepared(quantizer: Quantizer) -> tuple[HardtanhTask, nn.Module]:
    """In training mode, whose norms calibration must leave alone."""
    task = HardtanhTask()
    model = task.build_model()
    quantizer.prepare(model, quantizer.choose(model))
    data = task.dataset("calibration")
    quantizer.calibrate(model, task.forward, task.batches(data, range(64), 32, "cpu"))
    return task, model


def trained(quantizer: Quantizer, seed: int = 0, epochs: float = 1) -> tuple[ToyTask, nn.Module]:
    task, model = prepared(quantizer)
    unused = cast(Any, None)
    run = TrainingRun(model, task, cast(Structure, None), {}, torch.device("cpu"), unused, unused)
    with ExitStack() as around:
        for method in quantizer.methods(model):
            around.enter_context(method.around(run))
        task.train(model, epochs=epochs, lr=0.02, seed=seed)
    return task, model.eval()


def outputs(task: ToyTask, model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(task.dataset("test").tensors[0])
    return found


@each
def test_calibration_changes_nothing_of_the_float_model(quantizer):
    task, model = prepared(quantizer)
    for name, tensor in task.build_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@each
def test_a_copy_made_after_training_trains_by_itself(quantizer):
    task, model = trained(quantizer)
    before = outputs(task, model)
    other = copy.deepcopy(model)
    task.train(other, epochs=1, lr=0.1)
    assert torch.equal(outputs(task, model), before)
    assert not torch.equal(outputs(task, other), before)


def test_state_dicts_load_in_another_process(tmp_path):
    saved = []
    for quantizer in ALL:
        task, model = trained(quantizer)
        saved.append((model.state_dict(), outputs(task, model).clone()))
    torch.save(saved, tmp_path / "saved.pt")
    code = (
        "import sys; sys.path.insert(0, 'tests/quantization')\n"
        "import torch\n"
        "from test_trained_quantizers import ALL, HardtanhTask, outputs\n"
        "saved = torch.load(sys.argv[1], weights_only=True)\n"
        "for quantizer, (state, expected) in zip(ALL, saved, strict=True):\n"
        "    task = HardtanhTask()\n"
        "    model = task.build_model().eval()\n"
        "    quantizer.prepare(model, quantizer.choose(model))\n"
        "    model.load_state_dict(state)\n"
        "    assert torch.equal(outputs(task, model), expected), quantizer\n"
        "print('same')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved.pt")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "same\n", done.stderr


@each
def test_evaluation_changes_nothing_and_repeats_itself(quantizer):
    task, model = trained(quantizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = outputs(task, model)
    assert torch.equal(outputs(task, model), first)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@each
def test_the_same_seed_gives_the_same_model(quantizer):
    first, again, other = (trained(quantizer, seed)[1].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@each
def test_exported_programs_compute_the_same(quantizer):
    task, model = trained(quantizer)
    x = task.dataset("test").tensors[0]
    program = torch.export.export(model, (x,)).module()
    with torch.inference_mode():
        assert torch.allclose(program(x), model(x), atol=1e-5)
