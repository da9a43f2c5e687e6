"""Training methods: what happens around the steps of a training unit, on the replica.

The user's training loop is left alone: a method acts through hooks on the optimizer's steps
(`steps.py`), or replaces the loss of the run's own copy of the task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from raycompress.errors import TaskError
from raycompress.masks import Masks, hold
from raycompress.structure import Structure
from raycompress.task import Progress, Task
from raycompress.weights import Weights

__all__ = ["TrainingMethod", "TrainingRun", "train_within"]


@dataclass
class TrainingRun:
    """One training unit while it runs.

    Attributes:
        model: What is trained, on `device`.
        task: This run's own copy; a method may replace its `loss` or `forward`.
        structure: Of the dense model.
        masks: What is held at zero; empty for dense and slim models.
        device: Where the model is.
        weights: Loads weights by digest.
        build: The model of stored weights, on `device`, in eval mode; a teacher, for instance.
        step: Optimizer steps done, as far as the task's loop reports them.
        num_steps: Of how many; 0 before the first report.
        extra: Tensors to store beside the trained weights.
    """

    model: nn.Module
    task: Task
    structure: Structure
    masks: Masks
    device: torch.device
    weights: Callable[[str], Weights]
    build: Callable[[str], nn.Module]
    step: int = 0
    num_steps: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(ABC):
    """Base of all methods: a frozen dataclass of plain fields, at a module's top level.

    Attributes:
        dense_passes: Forward passes of the dense model in each step, beside the training's own;
            for the search's cost.
    """

    dense_passes: ClassVar[float] = 0.0

    @abstractmethod
    def around(self, run: TrainingRun) -> AbstractContextManager[None]:
        """Entered before `task.train` and left after it."""


def train_within(
    run: TrainingRun,
    methods: Sequence[TrainingMethod],
    *,
    epochs: float,
    lr: float | None,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Trains `run.model` in place with the task's own loop.

    Args:
        run: Its `step` and `num_steps` follow the loop.
        methods: Outermost first.
        epochs: Passes over the train split; 0: only the check is made.
        lr: Peak learning rate; None takes the task's own.
        seed: Of the order of examples.
        progress: Called with (step, number of steps, loss).

    Raises:
        TaskError: Weights aren't finite.
    """

    def report(step: int, num_steps: int, loss: float) -> None:
        run.step, run.num_steps = step, num_steps
        if progress is not None:
            progress(step, num_steps, loss)

    if epochs > 0:
        with ExitStack() as around:
            for method in methods:
                around.enter_context(method.around(run))
            around.enter_context(hold(run.model, run.masks))
            run.task.train(
                run.model, epochs=epochs, lr=lr, seed=seed, device=run.device, progress=report
            )
    for name, parameter in run.model.named_parameters():  # a loop of the user's may not look
        if not torch.isfinite(parameter).all():
            raise TaskError(f"training left NaN or infinity in {name!r}; lower the rate")
