"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531; FitNets, 1412.6550)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycompress.errors import TaskError
from raycompress.method import TrainingMethod, TrainingRun

__all__ = ["Distillation"]


@dataclass(frozen=True, kw_only=True)
class Distillation(TrainingMethod):
    """Trains toward the outputs, and features if asked for, of the dense model.

    The loss becomes (1 - weight) * L + weight * T^2 * KL(teacher || student) at temperature T,
    over the last dim of the outputs, averaged over the rest; T^2 keeps the gradients' scale
    (section 2 of the paper). Features add feature_weight * mean squared difference of the outputs
    of the named modules, each divided by the teacher's mean square; only modules whose outputs
    kept their shape will do, so that no projection has to be learned.

    Attributes:
        teacher: Digest of the teacher's weights.
        temperature: T, above 0.
        weight: Of the teacher's outputs, in [0, 1].
        features: Names of modules whose outputs are compared as well.
        feature_weight: Of each feature's term.
    """

    teacher: str
    temperature: float = 4.0
    weight: float = 0.9
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0

    dense_passes: ClassVar[float] = 1.0

    @contextmanager
    def around(self, run: TrainingRun) -> Iterator[None]:
        """Replaces `forward` and `loss` of the run's own task.

        Raises:
            TaskError: The outputs are no tensor of logits, a feature is missing or lost channels,
                or the task's own training loop never called `loss`.
        """
        teacher = run.build(self.teacher)
        task = run.task
        plain_forward, plain_loss = task.forward, task.loss
        students: dict[str, Tensor] = {}
        teachers: dict[str, Tensor] = {}
        targets: list[Any] = []
        calls = 0

        def forward(model: nn.Module, batch: Any) -> Any:
            outputs = plain_forward(model, batch)
            if model is run.model and model.training:
                with torch.no_grad():
                    targets[:] = [plain_forward(teacher, batch)]
            return outputs

        def loss(outputs: Any, batch: Any) -> Tensor:
            nonlocal calls
            value = plain_loss(outputs, batch)
            if not targets:
                return value
            calls += 1
            soft = distillation_loss(_logits(outputs), _logits(targets.pop()), self.temperature)
            value = (1 - self.weight) * value + self.weight * soft
            for name in self.features:
                value = value + self.feature_weight * _difference(
                    name, students[name], teachers[name]
                )
            return value

        with ExitStack() as hooks:
            for name in self.features:
                hooks.callback(_watch(run.model, name, students))
                hooks.callback(_watch(teacher, name, teachers))
            task.forward, task.loss = forward, loss  # type: ignore[method-assign]
            yield
        if not calls:
            raise TaskError(
                f"{type(task).__name__}.train never called self.forward and self.loss, so there "
                "was nothing to distil into"
            )


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) over the last dim, mean over the rest.

    Args:
        student: Logits, shape (..., classes).
        teacher: Logits of the same shape.
        temperature: T.
    """
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(dim=-1).mean()
    return divergence * temperature**2


def _logits(outputs: Any) -> Tensor:
    value = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise TaskError(
            "distillation needs outputs that are a tensor of logits, or have one as `logits`; "
            f"got {type(outputs).__name__}"
        )
    return value


def _difference(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise TaskError(
            f"distillation feature {name!r} has shape {tuple(student.shape)} in the pruned model "
            f"and {tuple(teacher.shape)} in the dense one; choose a module that loses no channels"
        )
    scale = teacher.float().square().mean().clamp_min(1e-12)
    return (student.float() - teacher.float()).square().mean() / scale


def _watch(model: nn.Module, name: str, into: dict[str, Tensor]) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise TaskError(f"distillation feature {name!r} is no module of the model") from None

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TaskError(f"distillation feature {name!r} must return a tensor")
        into[name] = output

    return module.register_forward_hook(keep).remove
