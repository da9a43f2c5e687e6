"""Runs a slim model on the example inputs, and says where it stops."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from raycompress.structure.model import Structure
from raycompress.structure.quiet import quiet
from raycompress.structure.slim import slim

__all__ = ["Stop", "described", "probe", "uneven"]


@dataclass(frozen=True)
class Stop:
    """Where a model raised.

    Attributes:
        module: name of the module whose code was running.
        error: type and first line.
        operators: how many operators had run before.
        made: whether there was a slim model to run.
    """

    module: str
    error: str
    operators: int
    made: bool = True

    def inside(self, module: str) -> bool:
        """Whether it stopped in that module or below it."""
        return not module or self.module == module or self.module.startswith(f"{module}.")


def uneven(structure: Structure, whole: Collection[str], seed: int) -> dict[str, range]:
    """Kept channels, another share of each group: what fits by chance for one doesn't for all."""
    generator = random.Random(seed)
    kept = {}
    for group in structure.groups:
        n = group.num_channels
        count = generator.randint(n // 3 + 1, max(n - 1, 1))
        if group.name not in whole:
            kept[group.name] = range(n - count, n)
    return kept


def probe(
    model: nn.Module,
    structure: Structure,
    kept: dict[str, range],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Stop | None:
    """Slims and runs the model; None if it runs."""
    try:
        small = slim(model, structure, kept)
    except Exception as error:  # foreign code may refuse to be copied by raising anything
        return Stop("", described(error), 0, made=False)
    stack: list[str] = []
    for name, module in small.named_modules():
        module.register_forward_pre_hook(_enter(stack, name))
        module.register_forward_hook(_leave(stack))
    counter = _Counter()
    with quiet(small):
        try:
            with counter:
                small(*args, **kwargs)
        except Exception as error:
            # Whatever foreign code raises, it says where module form can't follow.
            return Stop(stack[-1] if stack else "", described(error), counter.operators)
    return None


def described(error: Exception) -> str:
    """Type and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        return out


def _enter(stack: list[str], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        stack.append(name)

    return hook


def _leave(stack: list[str]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
        stack.pop()

    return hook
