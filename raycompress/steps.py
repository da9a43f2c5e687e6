"""Functions that run around every optimizer step, without a change to anyone's training loop.

torch calls them for every optimizer of the process; only steps of optimizers that hold a parameter
of the model in question count.
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

__all__ = ["after_step", "before_step"]

Step = Callable[[torch.optim.Optimizer], None]


@contextmanager
def before_step(model: nn.Module, function: Step) -> Iterator[None]:
    """Calls a function before every step of the model's optimizers: gradients are final there.

    Under AMP with a `GradScaler` they are unscaled by then.
    """
    handle = register_optimizer_step_pre_hook(_for(model, function))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_step(model: nn.Module, function: Step) -> Iterator[None]:
    """Calls a function after every step of the model's optimizers."""
    handle = register_optimizer_step_post_hook(_for(model, function))
    try:
        yield
    finally:
        handle.remove()


def _for(model: nn.Module, function: Step) -> Callable[..., None]:
    own = {id(p) for p in model.parameters()}

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            function(optimizer)

    return hook
