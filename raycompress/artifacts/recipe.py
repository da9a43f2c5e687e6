"""Models as a recipe (.safetensors): tensors and sizes, loaded onto the user's own class."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor, nn
from torch.fx import GraphModule

import raycompress
from raycompress.artifacts.export import Saved, first_line
from raycompress.errors import ArtifactError

__all__ = [
    "apply_recipe",
    "load_recipe",
    "read_recipe",
    "save_recipe",
    "to_recipe",
    "write_recipe",
]

_FORMAT = 1
_KEY = "raycompress"


def save_recipe(
    model: nn.Module, path: str | Path, *, kept: Mapping[str, int] | None = None
) -> Saved:
    """Writes all tensors of a model, and the numbers among its modules' attributes.

    Args:
        model: any module, slim or not.
        path: of the file, ending in .safetensors.
        kept: kept channels of each group, stored in the metadata.

    Raises:
        ArtifactError: the model is a graph, or a tensor of it can't be stored (sparse, "meta").
    """
    path = Path(path)
    write_recipe(path, *to_recipe(path, model, kept=kept))
    return Saved(path)


def to_recipe(
    path: Path, model: nn.Module, *, kept: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a model by name, and what else a file of them says.

    Raises:
        ArtifactError: the model is a graph.
    """
    if isinstance(model, GraphModule):
        raise ArtifactError(f"{path}: a graph has no class to be loaded onto: save it as .pt2")
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in _tensors(model).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors, {
        "format": _FORMAT,
        "raycompress": raycompress.__version__,
        "model": type(model).__name__,
        "tied": tied,
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "not_persistent": [n for n in _not_persistent(model) if n in tensors or n in tied],
        "numbers": {n: found for n, m in model.named_modules() if (found := dict(_numbers(m)))},
        "kept": {name: int(count) for name, count in (kept or {}).items()},
    }


def write_recipe(path: Path, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Writes a recipe; the file appears whole or not at all.

    Raises:
        ArtifactError: a tensor can't be stored (sparse, "meta").
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        # A copy: safetensors refuses tensors that are parts of one.
        whole = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(whole, partial, metadata={_KEY: json.dumps(recipe)})
        os.replace(partial, path)
    except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise ArtifactError(f"{path}: {recipe['model']}: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_recipe(path: str | Path, model: nn.Module) -> nn.Module:
    """Makes a new instance of the class, in place, what was saved; nothing is traced or run.

    Restored are tensors with their dtypes, ties and `requires_grad`, and numbers (and tuples of
    them) that the instance also has as attributes. Devices and modes are those of the instance;
    what a module only made when it was called (caches) is left to the next call.

    Args:
        path: of the file.
        model: as its class makes it, with the same arguments as the dense model; on the "meta"
            device it costs no memory.

    Raises:
        ArtifactError: the file is damaged, or was saved from another class or other arguments.
    """
    path = Path(path)
    tensors, recipe = read_recipe(path)
    if "packed" in recipe:
        raise ArtifactError(
            f"{path} holds packed weights: load it by "
            "raycompress.quantization.lowering.packed.load_packed"
        )
    return apply_recipe(path, model, tensors, recipe)


def read_recipe(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_recipe` wrote.

    Raises:
        ArtifactError: the file isn't there, is damaged, or holds no recipe.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recipe = _recipe(path, (file.metadata() or {}).get(_KEY))
            return {name: file.get_tensor(name) for name in file.keys()}, recipe
    except FileNotFoundError:
        raise ArtifactError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {first_line(error)}") from error


def apply_recipe(
    path: Path, model: nn.Module, tensors: dict[str, Tensor], recipe: dict[str, Any]
) -> nn.Module:
    """The second half of `load_recipe`.

    Args:
        path: for messages.
        model: changed in place.
        tensors: by name; those that are tied are added.
        recipe: from `read_recipe`.

    Raises:
        ArtifactError: they don't fit the model.
    """
    for name, same in recipe["tied"].items():
        if same not in tensors:
            raise ArtifactError(f"{path}: {name!r} is tied to {same!r}, which it lacks")
        tensors[name] = tensors[same]
    # A layer made without a bias may have got one (`fold_constants`).
    own: dict[str, Tensor | None] = {**dict.fromkeys(_left_out(model)), **_tensors(model)}
    _check(path, model, recipe, tensors, own)

    frozen = set(recipe["frozen"])
    devices = [t.device for t in own.values() if t is not None and t.device.type != "meta"]
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in own:
            continue
        if id(tensor) not in made:
            old = own[name]
            device = devices[0] if old is None and devices else torch.device("cpu")
            if old is not None and old.device.type != "meta":
                device = old.device
            new = tensor.to(device)
            if old is None or isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=name not in frozen)
            made[id(tensor)] = new
        place, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(place), attribute, made[id(tensor)])
    for place, module in model.named_modules():
        for name, value in recipe["numbers"].get(place, {}).items():
            _set_number(module, name, value)
    if any(type(module) is nn.MultiheadAttention for module in model.modules()):
        # Imported here since it comes with all of the analysis, which no other model needs.
        from raycompress.structure.attention import fit_attention

        fit_attention(model)
    # Modules that cache what they computed of their tensors drop it when their mode changes.
    modes = {module: module.training for module in model.modules()}
    model.train().eval()
    for module, mode in modes.items():
        module.training = mode
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _left_out(model: nn.Module) -> Iterator[str]:
    """Parameters that a module could have, such as a bias, but has not."""
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter, value in module._parameters.items():
            if value is None:
                yield f"{name}.{parameter}" if name else parameter


def _not_persistent(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        for buffer in sorted(module._non_persistent_buffers_set):
            yield f"{name}.{buffer}" if name else buffer


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        several = type(value) in (tuple, list, Size) and all(map(_is_number, value))
        if several or _is_number(value):
            yield name, value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _set_number(module: nn.Module, name: str, value: Any) -> None:
    # Only what the class itself made: no text of the file can add or replace anything else.
    own = dict(_numbers(module)).get(name)
    if own is None or isinstance(value, list) != isinstance(own, tuple | list):
        return
    if isinstance(own, tuple | list):
        if all(map(_is_number, value)) and value != list(own):
            setattr(module, name, type(own)(value))
    elif _is_number(value) and value != own and not (math.isnan(value) and math.isnan(own)):
        setattr(module, name, value)


def _recipe(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise ArtifactError(f"{path} holds tensors alone; raycompress didn't save it as a model")
    try:
        recipe = json.loads(text)
        if recipe["format"] != _FORMAT:
            raise ArtifactError(
                f"{path} is of format {recipe['format']}, this version reads {_FORMAT}"
            )
        kinds = {"tied": dict, "frozen": list, "not_persistent": list, "numbers": dict}
        if not all(isinstance(recipe[key], kind) for key, kind in kinds.items()):
            raise TypeError(f"{', '.join(kinds)} are of other types")
        names = (recipe["model"], *recipe["tied"].values(), *recipe["frozen"])
        if not all(isinstance(name, str) for name in (*names, *recipe["not_persistent"])):
            raise TypeError("names are no texts")
        if not all(isinstance(found, dict) for found in recipe["numbers"].values()):
            raise TypeError("numbers aren't those of modules")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} holds no recipe: {error!r}") from error
    return dict(recipe)


def _check(
    path: Path,
    model: nn.Module,
    recipe: dict[str, Any],
    tensors: dict[str, Tensor],
    own: dict[str, Tensor | None],
) -> None:
    """Whether the recipe fits the instance, before anything of it is changed."""
    kind = type(model).__name__
    if recipe["model"] != kind:
        raise ArtifactError(f"{path} was saved from a {recipe['model']}, not from a {kind}")
    passing = {*recipe["not_persistent"], *_not_persistent(model)}
    lacking = [n for n in tensors if n not in own and n not in passing]
    extra = [n for n, t in own.items() if t is not None and n not in passing and n not in tensors]
    for names, text in ((lacking, "holds {}, which the model lacks"), (extra, "lacks {}")):
        if names:
            listed = ", ".join(repr(n) for n in names[:5]) + (", ..." if len(names) > 5 else "")
            raise ArtifactError(
                f"{path} {text.format(listed)}: was the {kind} made with the same arguments?"
            )
    for name, tensor in tensors.items():
        old = own.get(name)
        if name in passing or old is None:
            continue
        large = tuple(old.shape)
        shape = tuple(tensor.shape)
        fits = len(shape) == len(large) and all(map(operator.le, shape, large))
        if tensor.is_floating_point() != old.is_floating_point():
            raise ArtifactError(f"{path}: {name!r} has dtype {tensor.dtype}, not {old.dtype}")
        if not fits:
            raise ArtifactError(
                f"{path}: {name!r} has shape {shape}, which is no part of the model's {large}: "
                f"was the {kind} made with the same arguments?"
            )
