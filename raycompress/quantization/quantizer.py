"""The contract of quantizers: frozen dataclasses whose fields are their YAML keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from raycompress.errors import ConfigError
from raycompress.method import TrainingMethod
from raycompress.quantization.layers import QUANTIZED

__all__ = ["Bits", "Quantizer", "default_layers", "inner_layers"]


@dataclass(frozen=True)
class Bits:
    """Bits of a layer's parts; None leaves a part in float.

    Attributes:
        weight: Of its weight.
        input: Of what it is given.
        output: Of what it returns.
    """

    weight: int | None = None
    input: int | None = None
    output: int | None = None


class Quantizer(ABC):
    """Base of all quantizers: a frozen keyword-only dataclass at a module's top level.

    The order of calls is `prepare`, `calibrate`, the task's training within `methods`.
    """

    @abstractmethod
    def choose(self, model: nn.Module) -> dict[str, Bits]:
        """What this quantizer does where nothing else is asked for: bits of layers by name."""

    @abstractmethod
    def prepare(self, model: nn.Module, choices: Mapping[str, Bits]) -> None:
        """Gives layers their quantizers, in place; keys of the float model's state dict stay.

        Raises:
            ConfigError: Bits that this quantizer doesn't have.
        """

    def calibrate(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Iterable[Any]
    ) -> None:
        """Sets ranges from calibration data, where the quantizer has ranges to set."""
        del model, forward, batches

    def methods(self, model: nn.Module) -> tuple[TrainingMethod, ...]:
        """What happens around the steps of training a prepared model."""
        del model
        return ()


def default_layers(model: nn.Module) -> list[str]:
    """Names of the layers that can be quantized, in the model's order of definition.

    Raises:
        ConfigError: There is none.
    """
    names = [name for name, module in model.named_modules() if type(module) in QUANTIZED]
    if not names:
        kinds = ", ".join(kind.__name__ for kind in QUANTIZED)
        raise ConfigError(f"the model has no layer that can be quantized; those are {kinds}")
    return names


def inner_layers(model: nn.Module) -> list[str]:
    """The same without the first and the last.

    Raises:
        ConfigError: There is none.
    """
    names = default_layers(model)[1:-1]
    if not names:
        raise ConfigError(
            "the model has no layer between its first and its last, which stay in float here; "
            "name the layers that are to be quantized"
        )
    return names
