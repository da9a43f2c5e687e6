"""A job's quantized models on the runtime that they are for: lowered, compared, scored."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from raycompress.data import Splits
from raycompress.errors import ConfigError, RaycompressError, VerificationError
from raycompress.plan import Plan
from raycompress.quantization.lowering import Lowered, lowering
from raycompress.quantization.quantizer import Quantization
from raycompress.task import Split, Task

__all__ = ["TOLERANCE", "Seen", "cpu_splits", "look", "lower_model", "try_lowering"]

TOLERANCE = 0.1
"""How far a lowered model may be from the fake-quantized one: the root of the mean squared
difference of outputs over that of the outputs, on test data. A runtime rounds where the simulation
doesn't (sums, outputs of layers), which comes to a few hundredths in deep models; a scale that was
lost comes to more than this."""


@dataclass(frozen=True)
class Seen:
    """What a lowered model does on data.

    Attributes:
        validation: Mean score on validation data.
        test: Mean score on test data.
        agreement: Fraction of test examples with the same largest output as in simulation; None:
            outputs aren't of shape (N, more than one).
        difference: As in `TOLERANCE`.
    """

    validation: float
    test: float
    agreement: float | None
    difference: float


def lower_model(
    plan: Plan, how: Quantization, model: nn.Module, float_model: nn.Module, folder: Path
) -> Lowered:
    """Brings a quantized model to the job's backend; files go to a folder, which is made.

    Args:
        plan: Of a job that lowers.
        how: The model was quantized.
        model: Prepared, calibrated, trained; in eval mode on the CPU.
        float_model: What it was made of.
        folder: Of the files.

    Raises:
        VerificationError: Fewer layers run in integers than were asked for.
        RaycompressError: The backend can't take the model.
    """
    assert plan.quantize is not None
    folder.mkdir(parents=True, exist_ok=True)
    section = plan.quantize.section
    batches = cpu_splits(plan).calibration(section.batches)

    def feed(fed: nn.Module) -> None:
        for batch in batches:
            plan.task.forward(fed, batch)

    with plan.config.evaluation.own_threads():
        lower = lowering(section.lower, "quantize.lower")
        lowered = lower(model, float_model, plan.task.example_inputs(), folder, feed, how)
    lowered.check()
    return lowered


def try_lowering(plan: Plan) -> None:
    """Lowers the dense model, barely calibrated, to see before any training whether it can be.

    Raises:
        ConfigError: It can't.
    """
    assert plan.quantize is not None
    how = plan.quantize.how
    # What waits for a step rounds now, or it would have no range to lower.
    at_once = {name: replace(bits, start_step=0) for name, bits in how.choices}
    how = Quantization.of(how.quantizer, at_once)
    model = copy.deepcopy(plan.model)
    batches = cpu_splits(plan).calibration(1)
    with plan.config.evaluation.own_threads(), torch.random.fork_rng(devices=[]):
        how.prepare(model)
        model.eval()
        if how.quantizer.needs_data:
            how.quantizer.calibrate(model, plan.task.forward, batches)
        if how.quantizer.trains != "no":  # some take their first range in training
            model.train()
            with torch.no_grad():
                plan.task.forward(model, batches[0])
            model.eval()
    with tempfile.TemporaryDirectory() as folder:
        try:
            lower_model(plan, how, model, plan.model, Path(folder))
        except RaycompressError as error:
            raise ConfigError(
                f"quantize.lower: {plan.quantize.section.lower} can't run this model quantized: "
                f"{error}"
            ) from error


def look(plan: Plan, simulated: nn.Module, lowered: Lowered, name: str) -> Seen:
    """Scores a lowered model as hosts score others, and compares it with the fake-quantized one.

    Raises:
        VerificationError: It isn't the model that was quantized.
    """
    task, splits = plan.task, cpu_splits(plan)
    noise, signal, equal, num = 0.0, 0.0, 0, 0
    with plan.config.evaluation.own_threads(), torch.no_grad():
        for batch in splits.batches("test"):
            exact, real = task.forward(simulated, batch), task.forward(lowered.model, batch)
            for one, two in zip(_floats(exact), _floats(real), strict=True):
                noise += float((one.double() - two.double()).square().sum())
                signal += float(one.double().square().sum())
            if isinstance(exact, Tensor) and exact.dim() == 2 and exact.shape[1] > 1:
                equal += int((exact.argmax(1) == real.argmax(1)).sum())
                num += len(exact)
        difference = math.sqrt(noise / signal) if signal else math.sqrt(noise)
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"{name}: on {lowered.backend} the quantized model computes something else than in "
                f"simulation (relative difference {difference:.2g}, at most {TOLERANCE:g}); it was "
                "not published"
            )
        scores = {split: _score(task, lowered.model, splits, split) for split in _JUDGED}
    agreement = equal / num if num else None
    return Seen(scores["validation"], scores["test"], agreement, difference)


_JUDGED: tuple[Split, ...] = ("validation", "test")


def cpu_splits(plan: Plan) -> Splits:
    """The task's data for models that the driver runs itself."""
    return Splits(plan.task, plan.config.evaluation.batch_size, 1, torch.device("cpu"))


def _floats(outputs: Any) -> list[Tensor]:
    leaves = tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _score(task: Task, model: nn.Module, splits: Splits, split: Split) -> float:
    if type(task).evaluate is not Task.evaluate:
        return float(task.evaluate(model, split))  # type: ignore[arg-type]
    total, num = 0.0, 0
    for batch in splits.batches(split):
        scores = task.score(task.forward(model, batch), batch)
        total += float(scores.double().sum())
        num += len(scores)
    return total / num
