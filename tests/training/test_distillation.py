"""Distillation: the loss by hand, and that students follow their teacher."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from raycompress.candidate import Candidate, Training
from raycompress.errors import TaskError
from raycompress.testing import ToyTask, toy_problem
from raycompress.training import Distillation
from raycompress.training.distillation import distillation_loss


def test_loss_by_hand():
    # Teacher (ln 3, 0) at T=1: q = (3/4, 1/4); student (0, 0): p = (1/2, 1/2).
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(distillation_loss(student, teacher, 1.0)) == pytest.approx(expected, rel=1e-6)
    # At T=2 the teacher's logits halve: q = (sqrt 3, 1) / (1 + sqrt 3), and T^2 = 4.
    q = math.sqrt(3) / (1 + math.sqrt(3))
    expected = 4 * (q * math.log(q / 0.5) + (1 - q) * math.log((1 - q) / 0.5))
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-6)
    assert float(distillation_loss(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-7)


def _student(problem, executor, methods):
    """A slim model trained for a while, against the dense one."""
    from raycompress.criteria import L1

    names = [g.name for g in problem.structure.groups]
    scores = L1().scores(problem.model, problem.structure, names, {})
    counts = {g.name: g.num_channels // 2 for g in problem.structure.groups}
    candidate = problem.candidate(
        counts, problem.ranking("channels", scores), training=Training(12.0, methods=methods)
    )
    return executor.evaluate([candidate])[0]


def test_student_comes_closer_to_its_teacher(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    # An untrained teacher: what it says is in no label, so only distillation can lead there.
    teacher = executor.host.build(Candidate(problem.weights))
    batch = next(iter(ToyTask().batches(ToyTask().dataset("validation"), range(96), 96, "cpu")))
    distances = []
    for methods in ((), (Distillation(teacher=problem.weights, weight=1.0),)):
        trial = _student(problem, executor, methods)
        assert trial.failure is None
        student = executor.host.build(Candidate(trial.weights))
        with torch.no_grad():
            distances.append(float(distillation_loss(student(batch[0]), teacher(batch[0]), 4.0)))
    assert distances[1] < 0.5 * distances[0]


def test_features_are_compared_where_channels_stayed(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    good = Distillation(teacher=problem.weights, features=("fc",), feature_weight=0.5)
    assert _student(problem, executor, (good,)).failure is None
    bad = Distillation(teacher=problem.weights, features=("conv3",))
    assert "conv3" in str(_student(problem, executor, (bad,)).failure)
    missing = Distillation(teacher=problem.weights, features=("conv9",))
    assert "'conv9' is no module" in str(_student(problem, executor, (missing,)).failure)


class SilentTask(ToyTask):
    """A loop of its own that goes around `self.loss`."""

    def train(self, model, *, epochs, lr=None, seed=0, device="cpu", progress=None):
        model.train()
        model(torch.randn(4, 2, 6, 6)).sum().backward()
        model.eval()


def test_loop_that_never_asks_for_the_loss_is_told():
    from test_toward import run_of

    model = ToyTask().build_model()
    run = run_of(model)
    run.task = SilentTask()
    with pytest.raises(TaskError, match=r"never called self.forward and self.loss"):
        with Distillation(teacher="t").around(run):
            run.task.train(model, epochs=1)
    assert not any(m._forward_hooks for m in model.modules())


def test_outputs_without_logits_are_refused():
    from test_toward import run_of

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ToyTask().build_model()

        def forward(self, x):
            return {"boxes": self.net(x)}

    class PairTask(ToyTask):
        def loss(self, outputs, batch):
            return super().loss(outputs["boxes"], batch)

    model = Pair()
    run = run_of(model)
    run.task = PairTask()
    with pytest.raises(TaskError, match="outputs that are a tensor of logits"):
        with Distillation(teacher="t").around(run):
            run.task.train(model, epochs=1)
