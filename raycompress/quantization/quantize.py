"""Quantizing one model in this process: what `Quantizer.quantize` does."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from raycompress.data import Splits
from raycompress.errors import ConfigError, TaskError
from raycompress.method import TrainingRun, train_within
from raycompress.quantization.layers import QUANTIZED
from raycompress.quantization.quantizer import Quantization, Quantizer
from raycompress.quantization.targets import QuantTarget, choices_of
from raycompress.structure import analyze
from raycompress.task import Task, check_device, check_instance, example_inputs_of
from raycompress.weights import Weights

__all__ = ["float_layers", "quantize"]

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
    _check_epochs(epochs)
    how.check_training(epochs, -(-len(task.dataset("train")) // task.batch_size) if epochs else 0)
    if lr is not None and not (_is_number(lr) and lr > 0):
        raise ConfigError(f"lr must be a number above 0, got {lr!r}")
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


def _check_epochs(epochs: float) -> None:
    if not (_is_number(epochs) and epochs >= 0):
        raise ConfigError(f"epochs must be a number, 0 or more, got {epochs!r}")


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
