"""What the user brings: a model, its data, a loss and a score.

Five methods make a task; everything else has a default that can be overridden. A task is named by
its import path (`jobs.tasks.digits:Digits`) and is constructed anew in every process, from the
same keyword arguments: it is never pickled.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from raycompress.errors import ConfigError, TaskError

__all__ = [
    "ClassificationTask",
    "Split",
    "Task",
    "check_device",
    "check_instance",
    "check_task",
    "example_inputs_of",
    "split_indices",
]

Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
Progress = Callable[[int, int, float], None]


class Task(ABC):
    """The contract between a user's model and raycompress.

    Attributes:
        batch_size: Examples in a batch, in training and (unless the job says otherwise) evaluation.
        score_name: What `score` measures, as it stands in tables and figures.
        lr: Default learning rate of `optimizer`.
        weight_decay: Default weight decay of `optimizer`.
    """

    batch_size: int = 128
    score_name: str = "score"
    lr: float = 0.05
    weight_decay: float = 5e-4

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, on the CPU; with its trained weights if the task knows where they are."""

    @abstractmethod
    def dataset(self, split: Split) -> Any:
        """A map-style dataset (`len`, `[i]`) of one split; the four splits are disjoint.

        `train` fits weights, `calibration` feeds statistics, `validation` selects, and `test` is
        reported on once and selects nothing.
        """

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Mean training loss of a batch: a scalar tensor, lower is better."""

    @abstractmethod
    def score(self, outputs: Any, batch: Any) -> Tensor:
        """One number for each example: a tensor of shape (n,), higher is better."""

    def collate(self, examples: list[Any]) -> Any:
        """Makes a batch of examples."""
        return default_collate(examples)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """The model's positional arguments in a batch; by default its first element."""
        return (batch[0],) if isinstance(batch, list | tuple) else (batch,)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Runs the model on a batch."""
        return model(*self.inputs(batch))

    def example_inputs(self) -> tuple[Any, ...]:
        """Positional arguments for one forward pass; by default the first two validation examples.

        At least two examples, so that an export keeps the batch size free.
        """
        data = self.dataset("validation")
        return self.inputs(self.collate([data[i] for i in range(min(2, len(data)))]))

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum 0.9; norms and biases are not decayed."""
        decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)

    def train(
        self,
        model: nn.Module,
        *,
        epochs: float,
        lr: float | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """Trains the model in place: cosine learning rate, AMP (bfloat16) on GPUs.

        Args:
            model: Already on `device`; left in eval mode.
            epochs: Passes over the train split; a fraction ends within a pass.
            lr: Peak learning rate; None takes the task's own.
            seed: Orders the examples; also seeds dropout.
            device: Where the model and the batches are.
            progress: Called with (step, number of steps, loss) after each step.

        Raises:
            TaskError: The loss is not a finite scalar.
        """
        device = torch.device(device)
        data = self.dataset("train")
        steps_per_epoch = -(-len(data) // self.batch_size)
        num_steps = max(1, round(epochs * steps_per_epoch))
        optimizer = self.optimizer(model, self.lr if lr is None else lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        order = torch.Generator().manual_seed(seed)
        step = 0
        model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            while step < num_steps:
                shuffled = torch.randperm(len(data), generator=order).tolist()
                for batch in self.batches(data, shuffled, self.batch_size, device):
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        loss = self.loss(self.forward(model, batch), batch)
                    if loss.dim() != 0:
                        raise TaskError(
                            f"{type(self).__name__}.loss must return a scalar tensor, got shape "
                            f"{tuple(loss.shape)}"
                        )
                    value = float(loss.detach())
                    if not torch.isfinite(loss.detach()):
                        raise TaskError(
                            f"{type(self).__name__}.loss must be finite, got {value} "
                            f"at training step {step + 1} of {num_steps}; lower the learning rate "
                            f"(now {self.lr if lr is None else lr}) or check the data"
                        )
                    optimizer.zero_grad(set_to_none=True)
                    torch.autograd.backward(loss)
                    optimizer.step()
                    schedule.step()
                    step += 1
                    if progress is not None:
                        progress(step, num_steps, value)
                    if step == num_steps:
                        break
        model.eval()

    def evaluate(self, model: nn.Module, split: Split) -> float | None:
        """The metric over a whole split, for metrics that are no mean over examples.

        The default, None, means that `score` is averaged. Override it for mAP, BLEU and the like;
        such a task is evaluated whole, never in shards.
        """
        return None

    def batches(
        self, data: Any, indices: Sequence[int], batch_size: int, device: torch.device | str
    ) -> Iterator[Any]:
        """Batches of `data[indices]`, in order, on the device."""
        whole = isinstance(data, TensorDataset) and type(self).collate is Task.collate
        for start in range(0, len(indices), batch_size):
            part = list(indices[start : start + batch_size])
            # A TensorDataset can be indexed by many at once, which is many times faster.
            batch = list(data[part]) if whole else self.collate([data[i] for i in part])
            yield move(batch, device)


class ClassificationTask(Task):
    """Cross-entropy and accuracy over batches `(inputs, integer labels)`.

    Only `build_model` and `dataset` are left to write.
    """

    score_name = "accuracy"

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Mean cross-entropy of logits of shape (n, classes)."""
        loss: Tensor = nn.functional.cross_entropy(outputs, batch[1])
        return loss

    def score(self, outputs: Any, batch: Any) -> Tensor:
        """1 for each example whose largest logit is its label's, else 0."""
        hits: Tensor = outputs.argmax(dim=-1) == batch[1]
        return hits.float()


def move(value: Any, device: torch.device | str) -> Any:
    """Moves the tensors in nested lists, tuples and dicts to the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(move(item, device) for item in value)
    return value


def split_indices(num: int, sizes: dict[str, int], seed: int = 0) -> dict[str, list[int]]:
    """Disjoint, shuffled parts of `range(num)`, e.g. for validation data carved out of training.

    Args:
        num: Number of examples.
        sizes: Examples for each part by name; at most one may be -1, "all that is left".
        seed: Of the shuffle.

    Raises:
        TaskError: The sizes exceed `num`.
    """
    fixed = sum(size for size in sizes.values() if size >= 0)
    if fixed > num or sum(size < 0 for size in sizes.values()) > 1:
        raise TaskError(f"split sizes {sizes} don't fit a dataset of {num} examples")
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
    parts: dict[str, list[int]] = {}
    start = 0
    for name, size in sizes.items():
        stop = start + (num - fixed if size < 0 else size)
        parts[name] = order[start:stop]
        start = stop
    return parts


def check_instance(task: object) -> None:
    """Raises a TaskError for what is no task."""
    if not isinstance(task, Task):
        raise TaskError(f"task must be an instance of raycompress.Task, got {task!r}")


def example_inputs_of(task: Task) -> tuple[Any, ...]:
    """A task's example inputs; what goes wrong in making them is a TaskError."""
    try:
        return task.example_inputs()
    except Exception as error:
        raise TaskError(
            f"{type(task).__name__}.example_inputs failed: {type(error).__name__}: {error}; its "
            "default takes examples of dataset('validation'), which must have len() and [i]"
        ) from error


def check_device(device: str) -> None:
    """Raises a ConfigError for a device that isn't there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} can't be used here: {reason}") from error


def _own(what: str, method: Callable[[], Any]) -> Any:
    """What a task's method returns on validation examples; its exception is the task's fault."""
    try:
        return method()
    except Exception as error:
        raise TaskError(
            f"{what} failed on validation examples: {type(error).__name__}: {error}"
        ) from error


def check_task(task: Task, model: nn.Module | None = None) -> nn.Module:
    """Runs two validation examples through a task, so that mistakes show before a job starts.

    Args:
        task: The user's task.
        model: Its model, if it is built already.

    Returns:
        The model, on the CPU and in eval mode.

    Raises:
        TaskError: With what is wrong, and what the contract asks for.
    """
    name = type(task).__name__
    if model is None:
        model = task.build_model()
    if not isinstance(model, nn.Module):
        raise TaskError(
            f"{name}.build_model must return a torch.nn.Module, got {type(model).__name__}"
        )
    places = {str(t.device) for t in [*model.parameters(), *model.buffers()]}
    if places - {"cpu"}:
        raise TaskError(
            f"{name}.build_model must return the model on the CPU, got parameters on "
            f"{', '.join(sorted(places))}; replicas move it to their own device"
        )
    batch = None
    for split in SPLITS:
        try:
            data = task.dataset(split)  # type: ignore[arg-type]
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(
                f"{name}.dataset({split!r}) failed: {type(error).__name__}: {error}"
            ) from error
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise TaskError(
                f"{name}.dataset({split!r}) must be map-style (len() and [i]), "
                f"got {type(data).__name__}"
            )
        if len(data) == 0:
            raise TaskError(f"{name}.dataset({split!r}) is empty")
        if split == "validation":
            batch = task.collate([data[i] for i in range(min(2, len(data)))])
            count = min(2, len(data))
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        try:
            outputs = task.forward(model, batch)
        except Exception as error:
            raise TaskError(
                f"{name}: the model doesn't take its own validation examples: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
                f"({name}.inputs(batch) says what of a batch the model is given)"
            ) from error
        try:
            model(*task.example_inputs())
        except Exception as error:
            raise TaskError(
                f"{name}: the model doesn't fit {name}.example_inputs(): "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        loss = _own(f"{name}.loss", lambda: task.loss(outputs, batch))
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TaskError(f"{name}.loss must return a scalar tensor, got {shape}")
        if not torch.isfinite(loss):
            raise TaskError(f"{name}.loss must be finite, got {float(loss)} on validation data")
        if type(task).evaluate is Task.evaluate:
            score = _own(f"{name}.score", lambda: task.score(outputs, batch))
            shape = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            if not isinstance(score, Tensor) or score.shape != (count,):
                raise TaskError(
                    f"{name}.score must return one number for each example, a tensor of shape "
                    f"({count},) here, got {shape}"
                )
            if not torch.isfinite(score.float()).all():
                raise TaskError(f"{name}.score must be finite, got {score.tolist()}")
    return model
