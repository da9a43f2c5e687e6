"""Module form must run: where a module's code computes with sizes that no attribute holds.

The slim model is tried once on the example inputs. Where it stops, the channels whose sizes the
failing module showed are frozen, and reported with the error, and everything else goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raycompress.structure.model import Structure
from raycompress.structure.quiet import quiet
from raycompress.structure.slim import slim
from raycompress.structure.trace import Trace

__all__ = ["MAX_REPAIRS", "freeze_sizes_of", "stops_in"]

MAX_REPAIRS = 64


def stops_in(
    model: nn.Module, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, str] | None:
    """(module, error) where a model with about half of each group stops; None if it runs."""
    kept = {}
    for group in structure.groups:
        # Uneven counts: what only works for halves shows itself.
        count = max(group.min_kept, (2 * group.num_channels) // 3)
        kept[group.name] = range(group.num_channels - count, group.num_channels)
    small = slim(model, structure, kept)
    stack: list[str] = []
    handles = []
    for name, module in small.named_modules():
        handles.append(module.register_forward_pre_hook(_enter(stack, name)))
        handles.append(module.register_forward_hook(_leave(stack)))
    try:
        with quiet(small), torch.no_grad():
            small(*args, **kwargs)
    except Exception as error:
        # Whatever foreign code raises, it says where module form can't follow.
        text = str(error).splitlines()[0][:120] if str(error) else ""
        return (stack[-1] if stack else ""), f"{type(error).__name__}: {text}"
    return None


def _enter(stack: list[str], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        stack.append(name)

    return hook


def _leave(stack: list[str]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
        stack.pop()

    return hook


def freeze_sizes_of(seen: Trace, module: str, error: str, tried: dict[str, int]) -> bool:
    """Freezes what a module's own operators showed, then what its parents' did.

    Returns:
        False if nothing is left to freeze.
    """
    tried[module] = tried.get(module, 0) + 1
    level = tried[module] - 1
    while level > 0 and module:
        module = module.rpartition(".")[0]
        level -= 1
    if level > 0:
        return False
    reason = f"the code of {module!r} computes with this size ({error})"
    for size in seen.sizes:
        inside = size.module == module or (module and size.module.startswith(f"{module}."))
        if inside or not module:
            for facet in size.facets:
                if facet.shape[size.dim] > 1:
                    seen.space.freeze(facet, reason)
    return True
