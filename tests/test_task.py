import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from raycompress.candidate import Candidate, Training
from raycompress.errors import TaskError
from raycompress.local import LocalExecutor
from raycompress.recalibration import check_recalibration, recalibrate
from raycompress.search import run_search
from raycompress.task import check_task, split_indices
from raycompress.testing import ToyNet, ToyTask, toy_problem


def broken(**methods):
    return type("Broken", (ToyTask,), methods)()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            broken(score=lambda self, o, b: torch.tensor(1.0)),
            "Broken.score must return one number for each example, a tensor of shape (2,) here, "
            "got ()",
        ),
        (
            broken(loss=lambda self, o, b: o.sum() * float("nan")),
            "Broken.loss must be finite, got nan on validation data",
        ),
        (
            broken(loss=lambda self, o, b: o),
            "Broken.loss must return a scalar tensor, got (2, 3)",
        ),
        (
            broken(loss=lambda self, o, b: nn.functional.cross_entropy(o, b[1] + 3)),
            "Broken.loss failed on validation examples: IndexError: Target",
        ),
        (
            broken(score=lambda self, o, b: o[:, 3]),
            "Broken.score failed on validation examples: IndexError",
        ),
        (
            broken(build_model=lambda self: "net"),
            "Broken.build_model must return a torch.nn.Module, got str",
        ),
        (
            broken(example_inputs=lambda self: (torch.zeros(2, 5, 6, 6),)),
            "Broken: the model doesn't fit Broken.example_inputs(): RuntimeError",
        ),
        (
            broken(build_model=lambda self: nn.Linear(3, 2)),
            "Broken: the model doesn't take its own validation examples: RuntimeError",
        ),
        (
            broken(dataset=lambda self, split: TensorDataset(torch.zeros(0))),
            "Broken.dataset('train') is empty",
        ),
        (
            broken(dataset=lambda self, split: open("/nowhere/images.idx")),
            "Broken.dataset('train') failed: FileNotFoundError: [Errno 2] No such file",
        ),
        (
            broken(dataset=lambda self, split: iter([1])),
            "Broken.dataset('train') must be map-style",
        ),
        (
            broken(build_model=lambda self: ToyNet().to("meta")),
            "Broken.build_model must return the model on the CPU, got parameters on meta",
        ),
    ],
)
def test_broken_tasks_say_what_is_wrong(task, message):
    with pytest.raises(TaskError) as caught:
        check_task(task)
    assert str(caught.value).startswith(message)


def test_nan_while_training_names_the_step():
    task = broken(loss=lambda self, o, b: o.sum() * float("nan"))
    with pytest.raises(TaskError, match=r"got nan at training step 1 of 3; lower the learning"):
        task.train(task.build_model(), epochs=1)


def test_training_learns_and_is_reproducible():
    task = ToyTask()
    models = [task.build_model(), task.build_model()]
    for model in models:
        task.train(model, epochs=12, seed=3)
    first, second = (list(model.state_dict().values()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    images, labels = task.dataset("test").tensors
    assert (models[0](images).argmax(1) == labels).float().mean() > 0.8


def test_splits_are_disjoint():
    parts = split_indices(100, {"a": 30, "b": -1, "c": 20}, seed=1)
    assert sorted(parts["a"] + parts["b"] + parts["c"]) == list(range(100))
    with pytest.raises(TaskError, match="don't fit"):
        split_indices(10, {"a": 11})


def test_recalibration_equals_the_average_over_batches():
    norm = nn.BatchNorm1d(3).eval()
    batches = [torch.randn(16, 3) + 5 for _ in range(4)]
    recalibrate(norm, norm, batches)
    means = torch.stack([b.mean(0) for b in batches]).mean(0)
    variances = torch.stack([b.var(0) for b in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert not norm.training and norm.momentum == 0.1


class _Shifted(ToyTask):
    """Calibration data unlike the training data."""

    def dataset(self, split):
        data = super().dataset(split)
        if split == "calibration":
            images, labels = data.tensors
            return TensorDataset(images * 5 + 9, labels)
        return data


def test_calibration_data_that_make_the_dense_model_worse_are_refused(tmp_path):
    problem, executor = toy_problem(str(tmp_path))
    trained = executor.evaluate([Candidate(problem.weights, training=Training(8.0))])[0].weights

    def check(task, batches):
        judge = LocalExecutor(task, problem.structure, executor.host.store)
        run_search(check_recalibration(trained, batches), judge)

    check(ToyTask(), 2)
    check(_Shifted(), 0)
    with pytest.raises(TaskError, match=r"from 2 calibration batches .* falls from 0\.\d+ to 0\."):
        check(_Shifted(), 2)
