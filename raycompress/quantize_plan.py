"""The job's `quantize` section: its keys, and what is checked before anything starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from raycompress.candidate import Training
from raycompress.config import JobConfig, TrainingConfig
from raycompress.errors import ConfigError
from raycompress.loading import build_quantizer
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.quantization import Bits, Quantization, Quantizer, choices_of
from raycompress.quantization.lowering import INTEGERS, lowering
from raycompress.quantization.quantize import float_layers
from raycompress.quantize_section import QuantizeSection
from raycompress.task import Task

__all__ = ["QuantizePlan", "check_found_bits", "plan_quantize"]


@dataclass(frozen=True, kw_only=True)
class QuantizePlan:
    """How a job quantizes, checked against its model.

    Attributes:
        how: The quantizer, the bits of each layer, and how many batches calibrate.
        section: The rest of what the job says.
        floats: Layers with weights that stay in float since their type can't be quantized.
    """

    how: Quantization
    section: QuantizeSection
    floats: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the quantizer, for people."""
        return type(self.how.quantizer).__name__

    def with_bits(self, found: Quantization | None) -> Quantization:
        """How a search's winner is quantized: with the bits that it found, if it looked for any."""
        if found is None:
            return self.how
        own = dict(self.how.choices)
        choices = {
            name: replace(bits, norm=own[name].norm, start_step=own[name].start_step)
            if name in own
            else bits
            for name, bits in found.choices
        }
        return Quantization.of(self.how.quantizer, choices, self.how.batches)

    def training(self, seed: int) -> Training:
        """Of a prepared and calibrated model; of no epochs if it is calibrated alone."""
        training = self.section.training
        if training is None:
            return Training(0.0, None, seed)
        return Training(training.epochs, training.lr, seed)


def plan_quantize(config: JobConfig, model: nn.Module, task: Task) -> QuantizePlan | None:
    """Checks a job's `quantize` against its dense model; None where there is none.

    Args:
        config: The job.
        model: Dense, on the CPU; it is only read.
        task: Has been checked.

    Raises:
        ConfigError: With the key, its value and what is allowed.
    """
    if config.quantize is None:
        return None
    quantizer, section = build_quantizer(config.quantize, "quantize")
    _check_training(quantizer, section.training)
    if section.lower != "none":
        lowering(section.lower, "quantize.lower")
    try:
        choices = choices_of(model, quantizer, section.config_list, task.example_inputs())
        epochs = 0.0 if section.training is None else section.training.epochs
        how = Quantization.of(quantizer, choices, section.batches)
        steps = -(-len(task.dataset("train")) // task.batch_size) if epochs else 0
        how.check_training(epochs, steps)
        how.prepare(copy.deepcopy(model))  # refuses bits that it doesn't have
    except ConfigError as error:
        glue = "." if str(error).startswith("config_list") else ": "
        raise ConfigError(f"quantize{glue}{error}") from error
    if section.lower in INTEGERS:
        _check_kernels(section.lower, quantizer, choices)
    return QuantizePlan(how=how, section=section, floats=tuple(float_layers(model)))


def check_found_bits(plan: QuantizePlan | None, pruner: Pruner, problem: Problem) -> None:
    """Raises a ConfigError where a job couldn't do what a pruner that finds bits is for."""
    bits = pruner.may_find(problem)
    if not bits:
        return
    name = type(pruner).__name__
    if plan is None:
        such = f"{{type: PTQ, lower: {pruner.timed_on or 'packed'}}}"
        raise ConfigError(
            f"{name} finds bits, and the job doesn't say how the model is trained and stored with "
            f"them: give quantize, such as quantize: {such}"
        )
    if plan.section.config_list:
        raise ConfigError(f"quantize.config_list must be left out: {name} finds the bits")
    backend = plan.section.lower
    other = any((e.weight, e.input) != (8, 8) for found in bits for _, e in found.choices)
    if backend in INTEGERS and other:
        raise ConfigError(
            f"quantize.lower: {backend} computes in integers where weight and input have 8 bits, "
            f"and {name} finds others; lower: packed stores any number of bits, and runs in "
            "simulation"
        )
    if pruner.timed_on not in ("", backend):
        raise ConfigError(
            f"quantize.lower must be {pruner.timed_on}, on which {name} times latency, "
            f"got {backend}"
        )
    for found in bits:
        try:
            plan.with_bits(found).prepare(copy.deepcopy(problem.model))
        except ConfigError as error:
            raise ConfigError(
                f"quantize.type: {plan.name} lacks bits that {name} may find: {error}"
            ) from error


def _check_training(quantizer: Quantizer, training: TrainingConfig | None) -> None:
    name = type(quantizer).__name__
    if quantizer.trains == "yes" and training is None:
        raise ConfigError(
            f"quantize.training is missing: {name} computes nothing useful before it is trained; "
            "give training: {epochs: 3}"
        )
    if quantizer.trains == "no" and training is not None:
        raise ConfigError(
            f"quantize.training must be left out: {name} isn't trained, got epochs "
            f"{training.epochs:g}; QAT and LSQ are"
        )


def _check_kernels(backend: str, quantizer: Quantizer, choices: Mapping[str, Bits]) -> None:
    """Raises a ConfigError for what a backend that computes in integers has no kernel for."""
    hint = "lower: packed stores any number of bits, and runs in simulation"
    for name, bits in choices.items():
        for part in ("weight", "input", "output"):
            value = getattr(bits, part)
            if value not in (None, 8):
                raise ConfigError(
                    f"quantize.lower: {backend} computes in 8 bits, and the {part} of {name!r} "
                    f"has {value}; {hint}"
                )
    if not any(bits.weight and bits.input for bits in choices.values()):
        raise ConfigError(
            f"quantize.lower: {backend} computes in integers where weight and input have 8 bits, "
            f"and {type(quantizer).__name__} leaves one of the two in float in every layer; {hint}"
        )
