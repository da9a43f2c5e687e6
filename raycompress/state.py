"""A trained model's state dict from a file, read without running code that is in it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raycompress.errors import ConfigError

__all__ = ["load_state"]


def load_state(model: nn.Module, path: Path) -> None:
    """Loads a file's state dict into a model, without unpickling code.

    Raises:
        ConfigError: There is no such file, it is no state dict, or it doesn't fit.
    """
    if not path.is_file():
        raise ConfigError(f"model.weights: no file {path}")
    state: dict[str, Tensor]
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise ConfigError(
            f"model.weights: {path} can't be read as a state dict: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ConfigError(
            f"model.weights: {path} isn't a state dict of tensors alone, and anything else could "
            "run code when it is loaded; save model.state_dict() instead"
        ) from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"model.weights: {path} doesn't fit {type(model).__name__}: {_misfit(model, state)}"
        ) from error


def _misfit(model: nn.Module, state: object) -> str:
    """The first reason why a state dict doesn't fit, and how many of its kind there are."""
    if not isinstance(state, dict):
        return f"it holds {type(state).__name__}, no state dict"
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [str(key) for key in state if key not in own]
    for words, keys in (("it lacks", missing), ("it has an unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            return f"{words} {keys[0]!r}{more}"
    for key, value in own.items():
        shape = getattr(state[key], "shape", None)
        if shape is None or tuple(shape) != tuple(value.shape):
            got = type(state[key]).__name__ if shape is None else tuple(shape)
            return f"{key!r} has shape {got}, must be {tuple(value.shape)}"
    return "it can't be loaded"
