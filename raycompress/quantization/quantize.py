"""Quantizing one model in this process: what `Quantizer.quantize` does."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raycompress.data import Splits
from raycompress.errors import ConfigError, TaskError
from raycompress.method import TrainingRun, train_within
from raycompress.quantization.layers import QUANTIZED
from raycompress.quantization.quantizer import Bits, Quantization, Quantizer
from raycompress.quantization.targets import QuantTarget, choices_of
from raycompress.structure import analyze
from raycompress.task import Task, check_device, check_instance, example_inputs_of
from raycompress.weights import Weights

__all__ = ["check_start", "float_layers", "quantize"]

_log = logging.getLogger(__name__)


def quantize(
    quantizer: Quantizer,
    model: nn.Module,
    task: Task,
    targets: Sequence[QuantTarget],
    *,
    epochs: float,
    lr: float | None,
    seed: int,
    device: str,
) -> nn.Module:
    """Checks all, prepares a copy, calibrates it and trains it; see `Quantizer.quantize`."""
    check_instance(task)
    check_device(device)
    example_inputs = example_inputs_of(task)
    choices = choices_of(model, quantizer, targets, example_inputs)
    how = Quantization.of(quantizer, choices)
    _check_epochs(quantizer, epochs)
    if lr is not None and not (_is_number(lr) and lr > 0):
        raise ConfigError(f"lr must be a number above 0, got {lr!r}")
    check_start(task, choices, epochs)
    quantized = copy.deepcopy(model)
    how.prepare(quantized)  # refuses bits that it doesn't have
    if epochs and not any(parameter.requires_grad for parameter in quantized.parameters()):
        raise ConfigError(f"epochs {epochs:g}: no parameter of the model requires a gradient")
    if names := float_layers(model):
        _log.warning("in float, since their types can't be quantized: %s", ", ".join(names))
    place = torch.device(device)
    quantized.to(place).eval()
    if quantizer.needs_data:
        batches = _calibration(task, how.batches, place)
        if not batches and not epochs:
            raise ConfigError(
                f"{type(quantizer).__name__} without training needs calibration data: "
                f"{type(task).__name__}.dataset('calibration') is empty"
            )
        quantizer.calibrate(quantized, task.forward, batches)
    if epochs:
        run = TrainingRun(
            model=quantized,
            task=copy.copy(task),
            structure=analyze(model, example_inputs, form="module"),
            masks={},
            device=place,
            # Nothing else is stored here: whatever the digest, it is the float model.
            weights=lambda digest: Weights(model.state_dict(), {}),
            build=lambda digest: copy.deepcopy(model).to(place).eval(),
        )
        methods = quantizer.methods(quantized)
        train_within(run, methods, epochs=epochs, lr=lr, seed=seed)
    return quantized.cpu().eval()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _check_epochs(quantizer: Quantizer, epochs: float) -> None:
    name = type(quantizer).__name__
    if not (_is_number(epochs) and epochs >= 0):
        raise ConfigError(f"epochs must be a number, 0 or more, got {epochs!r}")
    if quantizer.trains == "yes" and not epochs:
        raise ConfigError(f"{name} has to be trained: epochs must be above 0, got {epochs:g}")
    if quantizer.trains == "no" and epochs:
        raise ConfigError(f"{name} isn't trained: epochs must be 0, got {epochs:g}")


def check_start(task: Task, choices: Mapping[str, Bits], epochs: float) -> None:
    """Raises a ConfigError for a layer that would be rounded in none of the training's steps."""
    if not any(bits.start_step for bits in choices.values()):
        return
    steps = 0
    if epochs:
        steps = max(1, round(epochs * -(-len(task.dataset("train")) // task.batch_size)))
    for name, bits in choices.items():
        if bits.start_step >= max(steps, 1):
            raise ConfigError(
                f"quant_start_step {bits.start_step} of {name!r} is beyond the training, which has "
                f"{steps} steps; train longer or start earlier"
            )


def _calibration(task: Task, number: int, device: torch.device) -> list[Any]:
    try:
        return Splits(task, task.batch_size, 1, device).calibration(number)
    except Exception as error:
        raise TaskError(
            f"{type(task).__name__}.dataset('calibration') can't be read: "
            f"{type(error).__name__}: {error}"
        ) from error


def float_layers(model: nn.Module) -> list[str]:
    """Layers, with their types, whose weights stay in float since their type can't be quantized."""
    return [
        f"{name!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if type(module) not in QUANTIZED
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]
