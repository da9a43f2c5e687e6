"""Targets: which layers a pruner may touch, how much of each, and when.

NNI's `config_list`: a list of entries, each with `op_types`, `op_names` and/or `op_names_re` (where
several are given, all must match), and what is asked of the layers that match. Later entries win
where they overlap. What matches nothing is an error that names near matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import nn

from raycompress.errors import ConfigError
from raycompress.structure import Structure
from raycompress.wording import near

__all__ = [
    "POOL_KEYS",
    "ROUND_KEYS",
    "SCHEDULE_KEYS",
    "Choice",
    "Schedule",
    "Target",
    "config_list",
    "not_understood",
    "select_groups",
    "select_layers",
]


@dataclass(frozen=True, kw_only=True)
class Target:
    r"""One entry of the list.

    Attributes:
        op_types: Module class names such as "Conv2d"; "default": all; empty: any.
        op_names: Module names such as "layer1.0.conv1"; empty: any.
        op_names_re: Regular expressions that match whole module names, such as "layer1\..*conv1";
            empty: any.
        sparsity: Fraction removed of each layer, in [0, 1); None leaves it to the pruner.
        exclude: Matching layers stay whole.
        total_sparsity: Fraction removed of all matching layers together, in [0, 1): they compete
            under one threshold.
        max_sparsity_per_layer: Of a competing layer at most this fraction goes, in (0, 1).
        global_group_id: Entries with the same id compete together.
        initial_sparsity: Of gradual pruning, in [0, 1).
        final_sparsity: The same as `sparsity`, as gradual pruning calls it.
        start_epoch: First pruning of gradual pruning.
        end_epoch: Its last pruning.
        frequency: Epochs between its prunings.
        prune_iterations: Rounds of a lottery ticket, the same in all entries.
    """

    op_types: tuple[str, ...] = ()
    op_names: tuple[str, ...] = ()
    op_names_re: tuple[str, ...] = ()
    sparsity: float | None = None
    exclude: bool = False
    total_sparsity: float | None = None
    max_sparsity_per_layer: float | None = None
    global_group_id: str | None = None
    initial_sparsity: float | None = None
    final_sparsity: float | None = None
    start_epoch: float | None = None
    end_epoch: float | None = None
    frequency: float | None = None
    prune_iterations: int | None = None

    def __post_init__(self) -> None:
        if not (self.op_types or self.op_names or self.op_names_re):
            raise ConfigError("a target must name op_types, op_names or op_names_re")
        for name in ("op_types", "op_names", "op_names_re"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(
                    f"targets.{name} must be a list of names, got {getattr(self, name)!r}"
                )
        for name in ("sparsity", "total_sparsity", "initial_sparsity", "final_sparsity"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                raise ConfigError(f"targets.{name} must be a number in [0, 1), got {value!r}")
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"targets.{name} must be in [0, 1), got {value:g}")
        for pattern in self.op_names_re:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"targets.op_names_re: {pattern!r} is no regular expression: {error}"
                ) from None
        asked = [k for k in _ASKS if getattr(self, k) is not None]
        if self.exclude and asked:
            raise ConfigError(f"a target with exclude can't have {asked[0]} as well")
        amounts = [k for k in ("sparsity", "final_sparsity", "total_sparsity") if k in asked]
        if len(amounts) > 1:
            raise ConfigError(f"a target can't have both {amounts[0]} and {amounts[1]}")
        if self.max_sparsity_per_layer is not None:
            if not 0 < self.max_sparsity_per_layer < 1:
                raise ConfigError(
                    "targets.max_sparsity_per_layer must be in (0, 1), "
                    f"got {self.max_sparsity_per_layer:g}"
                )
            if self.total_sparsity is None and self.global_group_id is None:
                raise ConfigError(
                    "targets.max_sparsity_per_layer is for layers that compete: give "
                    "total_sparsity or global_group_id as well"
                )
        if self.frequency is not None and self.frequency <= 0:
            raise ConfigError(f"targets.frequency must be above 0, got {self.frequency:g}")
        if self.prune_iterations is not None and self.prune_iterations < 1:
            raise ConfigError(
                f"targets.prune_iterations must be at least 1, got {self.prune_iterations}"
            )

    def matches(self, name: str, kind: str) -> bool:
        """Whether a layer of that name and type is meant."""
        if self.op_types and kind not in self.op_types and "default" not in self.op_types:
            return False
        if self.op_names and name not in self.op_names:
            return False
        return not self.op_names_re or any(re.fullmatch(p, name) for p in self.op_names_re)


POOL_KEYS = ("total_sparsity", "max_sparsity_per_layer", "global_group_id")
SCHEDULE_KEYS = ("initial_sparsity", "start_epoch", "end_epoch", "frequency")
ROUND_KEYS = ("prune_iterations",)
_ASKS = ("sparsity", "final_sparsity", *POOL_KEYS, *SCHEDULE_KEYS, *ROUND_KEYS)


@dataclass(frozen=True)
class Schedule:
    """When and from where an entry's sparsity rises; None leaves it to the pruner."""

    initial_sparsity: float | None = None
    start_epoch: float | None = None
    end_epoch: float | None = None
    frequency: float | None = None


@dataclass(frozen=True)
class Choice:
    """What targets ask of one layer or channel group.

    Attributes:
        sparsity: Fraction removed; None: left to the pruner. With a pool: of the whole pool.
        pool: Units of one pool compete under one threshold; "": this one competes with nobody.
        max_sparsity: At most this fraction goes.
        schedule: Of gradual pruning.
        rounds: Of a lottery ticket; None: left to the pruner.
    """

    sparsity: float | None = None
    pool: str = ""
    max_sparsity: float = 1.0
    schedule: Schedule = Schedule()
    rounds: int | None = None


def not_understood(targets: Sequence[Target], understood: Iterable[str]) -> str:
    """The first key of a target that a pruner has no use for, "" if there is none."""
    known = {"sparsity", "final_sparsity", *understood}
    for entry in targets:
        for key in _ASKS:
            if getattr(entry, key) is not None and key not in known:
                return key
    return ""


def config_list(entries: Iterable[Mapping[str, Any] | Target]) -> tuple[Target, ...]:
    """Targets from NNI's `config_list`, such as [{"sparsity": 0.5, "op_types": ["Conv2d"]}].

    Later entries win where they overlap: `{"op_names": ["conv1"], "exclude": True}` goes last.

    Args:
        entries: The fields of `Target` as mappings; targets stay as they are.

    Raises:
        ConfigError: No list, or an unknown key, with what it may have meant.
    """
    return tuple(
        each if isinstance(each, Target) else Target(**each)
        for _, each in read_entries(entries, Target)
    )


Entry = TypeVar("Entry")


def read_entries(
    entries: Iterable[Mapping[str, Any] | Entry], kind: type[Entry]
) -> Iterator[tuple[int, Entry | dict[str, Any]]]:
    """Entries of a `config_list` with their positions: made ones, or the values of their fields.

    Args:
        entries: As users write them.
        kind: A dataclass: what an entry may be, and whose fields its keys are.

    Raises:
        ConfigError: No list, or an unknown key, with what it may have meant.
    """
    if isinstance(entries, Mapping | str) or not isinstance(entries, Iterable):
        raise ConfigError(
            f"config_list must be a list of entries, got {entries!r}; write [{{...}}]"
        )
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    for index, entry in enumerate(entries):
        if isinstance(entry, kind):
            yield index, entry
            continue
        if not isinstance(entry, Mapping):
            raise ConfigError(f"config_list[{index}] must be a mapping, got {entry!r}")
        for key in entry:
            if key not in known:
                raise ConfigError(
                    f"config_list[{index}]: no key {key!r}{near(key, known)}; "
                    f"allowed: {', '.join(known)}"
                )
        yield index, {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}


def select_layers(model: nn.Module, targets: Sequence[Target]) -> dict[str, Choice]:
    """Selected layers, and what is asked of each.

    Args:
        model: Its modules with a `weight` of two or more dims are the layers; norms are not.
        targets: Empty: every layer.

    Raises:
        ConfigError: An entry matches no layer, or entries that compete contradict each other.
    """
    layers = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if not isinstance(module, nn.LayerNorm | nn.RMSNorm)
        and getattr(getattr(module, "weight", None), "dim", lambda: 0)() >= 2
    }
    if not targets:
        return dict.fromkeys(layers, Choice())
    chosen: dict[str, Choice] = {}
    choices = _choices(targets)
    for entry, choice in zip(targets, choices, strict=True):
        _check_names(entry, layers)
        matching = [name for name, kind in layers.items() if entry.matches(name, kind)]
        if not matching:
            raise ConfigError(f"targets: no layer matches {_described(entry)}")
        for name in matching:
            chosen.pop(name, None)
            if not entry.exclude:
                chosen[name] = choice
    if not chosen:
        raise ConfigError("targets exclude every layer of the model")
    return chosen


def _choices(targets: Sequence[Target]) -> list[Choice]:
    """What each entry asks, with the pools that entries form together."""
    totals: dict[str, float] = {}
    choices = []
    for index, entry in enumerate(targets):
        pool = ""
        if entry.global_group_id is not None:
            pool = f"global_group_id {entry.global_group_id}"
        elif entry.total_sparsity is not None:
            pool = f"targets[{index}]"
        amounts = (entry.sparsity, entry.final_sparsity, entry.total_sparsity)
        amount = next((a for a in amounts if a is not None), None)
        if pool and amount is not None:
            if totals.setdefault(pool, amount) != amount:
                raise ConfigError(
                    f"targets with {pool} ask for total sparsities {totals[pool]:g} and "
                    f"{amount:g}; layers that compete have one"
                )
        choices.append(
            Choice(
                sparsity=amount,
                pool=pool,
                max_sparsity=1.0
                if entry.max_sparsity_per_layer is None
                else entry.max_sparsity_per_layer,
                schedule=Schedule(
                    entry.initial_sparsity, entry.start_epoch, entry.end_epoch, entry.frequency
                ),
                rounds=entry.prune_iterations,
            )
        )
    return [
        Choice(totals.get(c.pool, c.sparsity), c.pool, c.max_sparsity, c.schedule, c.rounds)
        for c in choices
    ]


def _check_names(entry: Target, layers: Mapping[str, str]) -> None:
    types = sorted(set(layers.values()))
    for name in entry.op_names:
        if name not in layers:
            raise ConfigError(f"targets.op_names: no layer {name!r}{near(name, layers)}")
    for kind in entry.op_types:
        if kind not in types and kind != "default":
            raise ConfigError(
                f"targets.op_types: the model has no layer of type {kind!r}, "
                f"only {', '.join(types)}{near(kind, types)}"
            )
    for pattern in entry.op_names_re:
        if not any(re.fullmatch(pattern, name) for name in layers):
            some = ", ".join(list(layers)[:5])
            raise ConfigError(
                f"targets.op_names_re: {pattern!r} matches no layer (it must match the whole "
                f"name); layers are {some}, ..."
            )


def _described(entry: Target) -> str:
    parts = {k: getattr(entry, k) for k in ("op_types", "op_names", "op_names_re")}
    return " and ".join(f"{k} {', '.join(v)}" for k, v in parts.items() if v)


def select_groups(
    model: nn.Module, structure: Structure, targets: Sequence[Target]
) -> dict[str, Choice]:
    """Selected channel groups, and what is asked of each.

    A coupled group is a target if any of its producing layers is, unless one is excluded by name.

    Raises:
        ConfigError: Two layers of one group ask for different things.
    """
    if not targets:
        return {group.name: Choice() for group in structure.groups}
    layers = select_layers(model, targets)
    last = {
        name: entry for entry in targets for name in layers_named(model, entry)
    }  # the last entry that names a layer
    excluded = {name for name, entry in last.items() if entry.exclude}
    chosen: dict[str, Choice] = {}
    for group in structure.groups:
        if excluded & set(group.producers):
            continue
        wanted = {name: layers[name] for name in group.producers if name in layers}
        if not wanted:
            continue
        explicit = {name: c for name, c in wanted.items() if c != Choice()}
        if len(set(explicit.values())) > 1:
            raise ConfigError(_contradiction(explicit))
        chosen[group.name] = next(iter(explicit.values()), Choice())
    if not chosen:
        frozen = {f.parameter.rpartition(".")[0]: f.reason for f in structure.frozen if f.dim == 0}
        why = next((f": the outputs of {n!r}: {frozen[n]}" for n in layers if n in frozen), "")
        raise ConfigError(f"targets select no channel group that can be pruned{why}")
    return chosen


def layers_named(model: nn.Module, entry: Target) -> list[str]:
    """Modules that an entry means by name, not only by type."""
    if not (entry.op_names or entry.op_names_re):
        return []
    return [n for n, m in model.named_modules() if entry.matches(n, type(m).__name__)]


def _contradiction(explicit: Mapping[str, Choice]) -> str:
    sparsities = {name: c.sparsity for name, c in explicit.items() if c.sparsity is not None}
    if len(set(sparsities.values())) > 1:
        pairs = " and ".join(f"{name} ({s:g})" for name, s in sparsities.items())
        return f"targets: {pairs} share their channels, and can't have different sparsities"
    pairs = " and ".join(explicit)
    return f"targets: {pairs} share their channels, and can't be asked for different things"
