"""What DoReFa, BNN and LSQ must do on a model, whatever their formulas are."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import ExitStack
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
def test_keys_of_the_float_model_stay(quantizer):
    task, model = prepared(quantizer)
    assert set(task.build_model().state_dict()) <= set(model.state_dict())
    for name, tensor in task.build_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@each
def test_copies_and_pickles_compute_the_same(quantizer):
    task, model = trained(quantizer)
    expected = outputs(task, model)
    assert torch.equal(outputs(task, copy.deepcopy(model)), expected)
    assert torch.equal(outputs(task, pickle.loads(pickle.dumps(model))), expected)
    assert pickle.loads(pickle.dumps(quantizer)) == quantizer


@each
def test_a_copy_made_after_training_trains_by_itself(quantizer):
    task, model = trained(quantizer)
    before = outputs(task, model)
    other = copy.deepcopy(model)
    task.train(other, epochs=1, lr=0.1)
    assert torch.equal(outputs(task, model), before)
    assert not torch.equal(outputs(task, other), before)


@each
def test_state_dicts_load_in_another_process(quantizer, tmp_path):
    task, model = trained(quantizer)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(outputs(task, model), tmp_path / "out.pt")
    code = (
        "import sys; sys.path.insert(0, 'tests/quantization')\n"
        "import torch\n"
        "from test_trained_quantizers import ALL, HardtanhTask, outputs\n"
        "task, quantizer = HardtanhTask(), ALL[int(sys.argv[1])]\n"
        "model = task.build_model().eval()\n"
        "quantizer.prepare(model, quantizer.choose(model))\n"
        "model.load_state_dict(torch.load(sys.argv[2] + '/state.pt', weights_only=True))\n"
        "expected = torch.load(sys.argv[2] + '/out.pt', weights_only=True)\n"
        "assert torch.equal(outputs(task, model), expected)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ALL.index(quantizer)), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=sys.modules[__name__].__file__.rpartition("/tests/")[0],
    )
    assert done.returncode == 0, done.stderr


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
def test_training_in_bfloat16_is_finite_and_keeps_float32_weights(quantizer):
    task, model = prepared(quantizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    for batch in task.batches(task.dataset("train"), range(96), 32, "cpu"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(model(batch[0]), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in model.parameters():
        assert parameter.dtype is torch.float32 and parameter.isfinite().all()
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@each
def test_exported_programs_compute_the_same(quantizer):
    task, model = trained(quantizer)
    x = task.dataset("test").tensors[0]
    program = torch.export.export(model, (x,)).module()
    with torch.inference_mode():
        assert torch.allclose(program(x), model(x), atol=1e-5)
