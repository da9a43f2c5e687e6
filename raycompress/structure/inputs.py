"""Example inputs: how a model is called with them, and what is wrong with those that don't fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from raycompress.errors import StructureError
from raycompress.structure.quiet import quiet

__all__ = ["Inputs", "as_call", "check_model", "why_not"]

Inputs = tuple[Any, ...] | Mapping[str, Any] | Tensor


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments.

    Raises:
        StructureError: it is neither a tensor, nor a tuple or list, nor a mapping of names.
    """
    if isinstance(inputs, Mapping):
        if not all(isinstance(name, str) for name in inputs):
            raise StructureError(f"example inputs: a mapping is of names, got {list(inputs)!r}")
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise StructureError(
        "example inputs must be a tensor, a tuple of positional arguments or a mapping of "
        f"keyword arguments, got {type(inputs).__name__}"
    )


def check_model(model: nn.Module) -> None:
    """Raises where no pass over the model could show its channels.

    Raises:
        StructureError: it is TorchScript, or a lazy layer has no shape yet.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise StructureError(
                f"{name or 'the model'!r} is TorchScript, whose code doesn't show its operators; "
                "analyse the module that it was made of"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise StructureError(f"{name!r} has no shape yet: run the model once before")


def why_not(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the model doesn't run on these arguments and where it stops; None if it runs."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, _args: Any, name: str = name) -> None:
            stack.append(f"{name!r} ({type(module).__name__})" if name else type(module).__name__)

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        with quiet(model):
            model(*args, **kwargs)
    except Exception as error:
        # Foreign code may raise anything; whatever it is, these inputs are no example.
        given = [*map(_described, args), *(f"{k}={_described(v)}" for k, v in kwargs.items())]
        where = stack[-1] if stack else type(model).__name__
        return (
            f"the model doesn't run on the example inputs ({', '.join(given)}): it stops in "
            f"{where}: {type(error).__name__}: {error}"
        )
    finally:
        for handle in handles:
            handle.remove()
    return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
