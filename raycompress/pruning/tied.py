"""Layers by their weights: tied ones are one, and computed ones can't be pruned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from raycompress.criteria import parameter_name
from raycompress.errors import ConfigError
from raycompress.targets import Choice

__all__ = ["own_weights"]


def own_weights(model: nn.Module, choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """The layers whose weights are parameters of their own; tied ones once, by their first name.

    Args:
        model: Has the layers.
        choices: What is asked of each.

    Raises:
        ConfigError: A weight is computed from others, or layers that share one are asked for
            different things.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sharing: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        layer = name.removesuffix("weight").removesuffix(".")
        if name == parameter_name(layer):
            sharing.setdefault(id(parameter), []).append(layer)
    own: dict[str, Choice] = {}
    for layer, choice in choices.items():
        weight = parameters.get(parameter_name(layer))
        if weight is None:
            raise ConfigError(
                f"targets: the weight of {layer!r} is no parameter, but computed from others "
                "(a parametrization): exclude it, or remove the parametrization first"
            )
        tied = sharing[id(weight)]
        other = next((name for name in tied if choices.get(name) != choice), None)
        if other is not None:
            raise ConfigError(
                f"targets: {layer!r} and {other!r} share one weight, and can't be asked for "
                "different things: name both, or exclude both"
            )
        if not own.keys() & set(tied):
            own[layer] = choice
    return own
