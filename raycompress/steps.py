"""Functions that run around every optimizer step, without a change to anyone's training loop.

torch calls them for every optimizer of the process; only steps of optimizers that hold a parameter
of the model in question count, and steps that a `GradScaler` skips count not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from raycompress.errors import TaskError

__all__ = ["after_step", "before_step", "stepped"]

Step = Callable[[torch.optim.Optimizer], None]


def stepped(optimizer: torch.optim.Optimizer) -> set[int]:
    """`id` of every parameter that an optimizer updates: a loop may have several optimizers."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@contextmanager
def before_step(model: nn.Module, function: Step) -> Iterator[None]:
    """Calls a function before every step of the model's optimizers: gradients are final there.

    Under AMP with a `GradScaler` they are unscaled by then, also those that a fused optimizer
    would unscale itself.

    Raises:
        TaskError: In the step, if it is given a closure: gradients aren't known before it.
    """
    own = {id(p) for p in model.parameters()}

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not own & stepped(optimizer) or _skipped(optimizer):
            return
        if kwargs.get("closure") is not None or any(callable(arg) for arg in args[1:]):
            raise TaskError(
                f"{type(optimizer).__name__}.step is called with a closure, which computes "
                "gradients inside of the step, where no training method can reach them; call "
                "backward() before optimizer.step()"
            )
        _unscale(optimizer)
        function(optimizer)

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_step(model: nn.Module, function: Step) -> Iterator[None]:
    """Calls a function after every step of the model's optimizers."""
    own = {id(p) for p in model.parameters()}

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if own & stepped(optimizer) and not _skipped(optimizer):
            function(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer changes nothing in this step: a scaled gradient overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """Divides gradients by the scale that a `GradScaler` left for a fused optimizer to divide by.

    The optimizer then finds no scale, and divides no more.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
