"""The contract of quantizers: frozen dataclasses whose fields are their YAML keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from raycompress.errors import ConfigError
from raycompress.method import TrainingMethod
from raycompress.plain import from_plain, to_plain
from raycompress.quantization.layers import QUANTIZED
from raycompress.task import Task

__all__ = ["Bits", "Quantization", "Quantizer", "check_parts", "default_layers", "inner_layers"]


@dataclass(frozen=True)
class Bits:
    """Bits of a layer's parts; None leaves a part in float.

    Attributes:
        weight: Of its weight.
        input: Of what it is given.
        output: Of what it returns.
        start_step: Training batches seen before the quantizer rounds.
        norm: Name of the BatchNorm that alone reads what the layer returns; "" if there is none.
    """

    weight: int | None = None
    input: int | None = None
    output: int | None = None
    start_step: int = 0
    norm: str = ""


class Quantizer(ABC):
    """Base of all quantizers: a frozen keyword-only dataclass at a module's top level.

    The order of calls is `prepare`, `calibrate`, the task's training within `methods`.
    """

    parts: ClassVar[tuple[str, ...]] = ("weight", "input")
    """What of a layer it can quantize: "weight", "input", "output"."""
    delays: ClassVar[bool] = False
    """Whether it honours `Bits.start_step`."""
    needs_data: ClassVar[bool] = True
    """Whether it needs calibration data where it isn't trained."""
    trains: ClassVar[Literal["no", "optional", "yes"]] = "optional"
    """Whether a model that it prepared is trained; "yes": it computes nothing useful before."""
    passes: ClassVar[float] = 1.0
    """Forward passes over the calibration batches that `calibrate` takes; for a search's cost."""

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

    def quantize(
        self,
        model: nn.Module,
        task: Task,
        config_list: Iterable[Any] = (),
        *,
        epochs: float = 0.0,
        lr: float | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> nn.Module:
        """Quantizes a copy of a model in this process; needs neither Ray nor a job.

        What comes back computes in float with the numbers that integers would have.

        Args:
            model: Trained, on the CPU; it is only read.
            task: Calibrates by its calibration split, and trains with its own loop.
            config_list: Which layers, their parts and bits: mappings with the keys of
                `QuantTarget`, or such; empty: as the quantizer chooses.
            epochs: Passes over the train split; 0: calibrated alone.
            lr: Peak learning rate; None takes the task's own.
            seed: Of the order of examples.
            device: Where it is calibrated and trained.

        Returns:
            The quantized model, in eval mode, on the CPU. Its state dict has the keys of `model`'s
            and more.

        Raises:
            ConfigError: Entries, bits, epochs or device can't be honoured, or there is no data to
                calibrate by. Nothing was trained then.
            TaskError: `task` is none, or broke its contract.
            StructureError: The model can't run on the task's example inputs.
        """
        # Both import this module.
        from raycompress.quantization.quantize import quantize
        from raycompress.quantization.targets import quant_config_list

        targets = quant_config_list(config_list)
        return quantize(self, model, task, targets, epochs=epochs, lr=lr, seed=seed, device=device)


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized: plain data, part of a candidate.

    Attributes:
        quantizer: With its settings.
        choices: (layer, its bits), sorted by name.
        batches: Calibration batches.
    """

    quantizer: Quantizer
    choices: tuple[tuple[str, Bits], ...]
    batches: int = 8

    @staticmethod
    def of(quantizer: Quantizer, choices: Mapping[str, Bits], batches: int = 8) -> Quantization:
        """From choices as a dict."""
        return Quantization(quantizer, tuple(sorted(choices.items())), batches)

    def prepare(self, model: nn.Module) -> None:
        """Gives a float model its quantizers, in place."""
        self.quantizer.prepare(model, dict(self.choices))

    def restore(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Makes of a float model, in place, the quantized one that a state dict is of."""
        self.prepare(model)
        model.load_state_dict(dict(state))

    def check_training(self, epochs: float, steps_per_epoch: int) -> None:
        """Raises a ConfigError if the quantizer can't do with so many epochs of training."""
        name = type(self.quantizer).__name__
        if self.quantizer.trains == "yes" and not epochs:
            raise ConfigError(f"{name} has to be trained: epochs must be above 0, got {epochs:g}")
        if self.quantizer.trains == "no" and epochs:
            raise ConfigError(f"{name} isn't trained: epochs must be 0, got {epochs:g}")
        steps = max(1, round(epochs * steps_per_epoch)) if epochs else 0
        for layer, bits in self.choices:
            if bits.start_step >= max(steps, 1):  # it would be rounded in none of them
                raise ConfigError(
                    f"quant_start_step {bits.start_step} of {layer!r} is beyond the training, "
                    f"which has {steps} steps; train longer or start earlier"
                )

    def words(self) -> str:
        """Bits of all layers, such as "W8 A8", or "W2-8 A8" where layers differ."""
        words = []
        for letter, part in (("W", "weight"), ("A", "input"), ("O", "output")):
            known = sorted({b for _, bits in self.choices if (b := getattr(bits, part))})
            if known:
                ends = str(known[0]) if len(known) == 1 else f"{known[0]}-{known[-1]}"
                words.append(f"{letter}{ends}")
        return " ".join(words)

    def key(self) -> dict[str, Any]:
        """Plain data for keys and files."""
        return {
            "quantizer": to_plain(self.quantizer),
            "choices": {name: dict(vars(bits)) for name, bits in self.choices},
            "batches": self.batches,
        }

    @staticmethod
    def from_key(key: Mapping[str, Any]) -> Quantization:
        """The inverse of `key`, also after a trip through JSON."""
        choices = {name: Bits(**bits) for name, bits in key["choices"].items()}
        quantizer = from_plain(key["quantizer"], Quantizer)
        return Quantization.of(quantizer, choices, key["batches"])


def check_parts(quantizer: Quantizer, choices: Mapping[str, Bits]) -> None:
    """Raises a ConfigError for parts of layers that a quantizer doesn't quantize."""
    for name, bits in choices.items():
        for part in ("weight", "input", "output"):
            if getattr(bits, part) is not None and part not in quantizer.parts:
                raise ConfigError(
                    f"{type(quantizer).__name__} quantizes no {part}, got {getattr(bits, part)} "
                    f"bits: {name}; quant_types may be {', '.join(quantizer.parts)}"
                )
        if bits.start_step and not quantizer.delays:
            raise ConfigError(
                f"{type(quantizer).__name__} has no quant_start_step, got {bits.start_step}: {name}"
            )


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
