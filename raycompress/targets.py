"""Targets: which layers a pruner may touch, and how much of each.

NNI's `config_list`: a list of entries, each with `op_types` and/or `op_names` (both: their
intersection), `sparsity`, or `exclude: true`. Later entries win where they overlap. What matches
nothing is an error that names near matches.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from raycompress.errors import ConfigError
from raycompress.structure import Structure

__all__ = ["Target", "select_groups", "select_layers"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One entry of the list.

    Attributes:
        op_types: Module class names such as "Conv2d"; empty: any.
        op_names: Module names such as "layer1.0.conv1"; empty: any.
        sparsity: Fraction removed, in [0, 1); None leaves it to the pruner.
        exclude: Matching layers stay whole.
    """

    op_types: tuple[str, ...] = ()
    op_names: tuple[str, ...] = ()
    sparsity: float | None = None
    exclude: bool = False

    def __post_init__(self) -> None:
        if not self.op_types and not self.op_names:
            raise ConfigError("a target must name op_types, op_names, or both")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ConfigError(f"targets.sparsity must be in [0, 1), got {self.sparsity:g}")
        if self.exclude and self.sparsity is not None:
            raise ConfigError("a target with exclude can't have a sparsity as well")


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def select_layers(model: nn.Module, targets: Sequence[Target]) -> dict[str, float | None]:
    """Selected layers with their sparsity (None: left to the pruner).

    Args:
        model: Its modules with a `weight` of two or more dims are the layers.
        targets: Empty: every layer.

    Raises:
        ConfigError: An entry names a layer or a type that the model doesn't have.
    """
    layers = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "dim", lambda: 0)() >= 2
    }
    if not targets:
        return dict.fromkeys(layers)
    types = sorted(set(layers.values()))
    chosen: dict[str, float | None] = {}
    for entry in targets:
        for name in entry.op_names:
            if name not in layers:
                raise ConfigError(f"targets.op_names: no layer {name!r}{_near(name, [*layers])}")
        for kind in entry.op_types:
            if kind not in types and kind != "default":
                raise ConfigError(
                    f"targets.op_types: the model has no layer of type {kind!r}, "
                    f"only {', '.join(types)}{_near(kind, types)}"
                )
        for name, kind in layers.items():
            if entry.op_names and name not in entry.op_names:
                continue
            if entry.op_types and kind not in entry.op_types and "default" not in entry.op_types:
                continue
            chosen.pop(name, None)
            if not entry.exclude:
                chosen[name] = entry.sparsity
    if not chosen:
        raise ConfigError("targets exclude every layer of the model")
    return chosen


def select_groups(
    model: nn.Module, structure: Structure, targets: Sequence[Target]
) -> dict[str, float | None]:
    """Selected channel groups with their sparsity (None: left to the pruner).

    A coupled group is a target if any of its producing layers is, unless one is excluded by name.

    Raises:
        ConfigError: Two layers of one group ask for different sparsities.
    """
    if not targets:
        return {group.name: None for group in structure.groups}
    layers = select_layers(model, targets)
    last = {
        name: entry for entry in targets for name in entry.op_names
    }  # the last entry that names a layer
    excluded = {name for name, entry in last.items() if entry.exclude}
    chosen: dict[str, float | None] = {}
    for group in structure.groups:
        if excluded & set(group.producers):
            continue
        wanted = {name: layers[name] for name in group.producers if name in layers}
        if not wanted:
            continue
        explicit = {name: s for name, s in wanted.items() if s is not None}
        if len(set(explicit.values())) > 1:
            pairs = " and ".join(f"{name} ({s:g})" for name, s in explicit.items())
            raise ConfigError(
                f"targets: {pairs} share their channels, and can't have different sparsities"
            )
        chosen[group.name] = next(iter(explicit.values()), None)
    if not chosen:
        raise ConfigError("targets select no channel group that can be pruned")
    return chosen
