"""What a job found, as plain data: the source of summary.json, of the report and of the figures.

Light on purpose: reading a summary back and rendering it needs neither torch, Ray nor MLflow.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from raycompress.pareto import Point
from raycompress.typed_data import from_data, to_data

__all__ = [
    "Curve",
    "FrozenLayer",
    "JobResult",
    "Latency",
    "Limit",
    "ModelRow",
    "QuantizedResult",
    "SampleRow",
    "SearchStep",
    "TrialResult",
    "Verification",
]

FORMAT = 1
"""Version of the JSON; a reader refuses a newer one."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        batch_size: Examples in the pass.
        median_ms: Milliseconds, median of the timed passes.
        p10_ms: Milliseconds, 10th percentile.
        p90_ms: Milliseconds, 90th percentile.
        peak_bytes: Most memory that the pass takes beyond parameters and inputs.
    """

    batch_size: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    peak_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model, measured: a row of the final table.

    Attributes:
        name: "dense": as it came; "masked": zeros in place of what was removed; "slim": really
            smaller. "quantized": the last of these computing with the numbers that integers would
            have, in float. "lowered": that on its runtime.
        score_validation: Mean score on validation data, higher is better; None: not measured.
        score_test: The same on test data, on which nothing was selected.
        params: Parameters that are stored.
        nonzero_params: Parameters that aren't zero.
        macs: Multiply-adds of one example.
        latency: By ascending batch size, all models of a job on the same device.
        file_bytes: Size of the weights as a file, in bytes.
    """

    name: Literal["dense", "masked", "slim", "quantized", "lowered"]
    params: int
    nonzero_params: int
    macs: int
    file_bytes: int
    score_validation: float | None = None
    score_test: float | None = None
    latency: tuple[Latency, ...] = ()

    def at(self, batch_size: int) -> Latency | None:
        """The latency at a batch size, if it was measured."""
        return next((entry for entry in self.latency if entry.batch_size == batch_size), None)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One limit of a budget, and what the slim model really has.

    Attributes:
        resource: "macs", "params" or "latency_ms".
        asked: As the user wrote it, such as "50%".
        limit: In the resource's own unit.
        measured: Of the slim model, in the same unit.
        dense: Of the dense model, in the same unit, measured beside it.
        predicted: What the search counted with, where that is a prediction: latency.
    """

    resource: str
    asked: str
    limit: float
    measured: float
    dense: float
    predicted: float | None = None

    @property
    def met(self) -> bool:
        """Whether the slim model is within the limit."""
        return self.measured <= self.limit


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Whether slim computes what masked does.

    Attributes:
        kind: "exact"; "inexact": differs for the named reasons; "wrong".
        max_error: Largest absolute difference, relative to the largest absolute output.
        reasons: Operations across pruned channels, or what is wrong.
        reference_error: Against the masked model whose operations across channels see the kept
            channels only; None where slim equals masked.
    """

    kind: Literal["exact", "inexact", "wrong"]
    max_error: float
    reasons: tuple[str, ...] = ()
    reference_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """One step of a search.

    Attributes:
        step: Number, from 0.
        score: Best mean validation score among the step's candidates.
        loss: Mean validation loss of the same candidate.
        best_score: Best score so far.
        best_loss: Lowest loss so far.
        within_loss: Lowest loss so far of a candidate within the budget; infinite before there is
            one, as where a search shrinks the model step by step.
        dfe: Cost so far, in dense-forward equivalents.
        failed: Candidates of this step that failed.
        figures: What the search itself reports, such as residuals.
    """

    step: int
    score: float
    loss: float
    best_score: float
    best_loss: float
    dfe: float
    within_loss: float = math.inf
    failed: int = 0
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Sensitivity of one channel group (or layer, for single weights).

    Attributes:
        group: Its name.
        num: Units (channels or weights) that it has.
        points: (fraction removed, mean validation score), ascending.
    """

    group: str
    num: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class FrozenLayer:
    """Something that can't be pruned, and why.

    Attributes:
        name: Parameter or layer.
        reason: Why, in words.
    """

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class QuantizedResult:
    """How a trial's model was quantized, and what a runtime makes of it.

    Attributes:
        quantizer: Class name.
        bits: Of weights, inputs and outputs, such as "W8 A8".
        num_layers: Quantized layers.
        in_float: Layers with weights that stay in float since their type can't be quantized.
        weights: Digest of the quantized weights in the weight store.
        folder: Path of its files: scales and zero points (`load_calibration` reads them), each
            layer's ranges and errors (layers.parquet), and the lowered model.
        kept_float: Layers that stay in float since they were left out, or so it was found.
        no_calibration: Why there are no scales and zero points; "" if there are.
        backend: To which it was lowered; "" if it stays simulated.
        runs: "integers": really; "simulation": the file is small, the arithmetic is in float.
        layers_asked: Layers that are to run in integers.
        layers_integer: Layers that do.
        agreement: Fraction of test examples with the same largest output as in simulation; None:
            outputs have no classes.
        difference: From simulation on test data: the root of the mean squared difference of outputs
            over that of the outputs.
        file: Path of the lowered model.
        file_bytes: Its size.
        float_bytes: Size of the float model in the same format.
        float_latency: Of the float model on the same runtime, timed in turns with all lowered
            models of the job.
        model: URI of the lowered model in MLflow, "" if none.
    """

    quantizer: str
    bits: str
    num_layers: int
    in_float: tuple[str, ...] = ()
    weights: str = ""
    folder: str = ""
    no_calibration: str = ""
    kept_float: tuple[str, ...] = ()
    backend: str = ""
    runs: Literal["integers", "simulation"] = "simulation"
    layers_asked: int = 0
    layers_integer: int = 0
    agreement: float | None = None
    difference: float = 0.0
    file: str = ""
    file_bytes: int = 0
    float_bytes: int = 0
    float_latency: tuple[Latency, ...] = ()
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One pruner with one budget and one seed.

    Attributes:
        name: Unique in the job.
        pruner: Class name; "" for the dense model, which is quantized alone.
        seed: Of the search.
        budget: As the user wrote it, such as "macs 50%"; "" without one.
        limits: The budget's limits, each with what was measured on the slim model.
        counts: (group, kept, of how many) for each channel group or layer that the pruner chose
            for, in the model's order.
        rows: "masked", "slim", ... in this order.
        verification: Of slim against masked; None where nothing was slimmed.
        dfe: Cost in dense-forward equivalents of all evaluations that the search asked for.
        evaluations: Candidates that this run evaluated.
        replayed: Candidates that the ledger answered.
        seconds: Wall time of the search in this run.
        curve: By step.
        model: Path or URI of the slim model, "" if none was kept.
        masks: Path of the masks, "" if none were kept.
        weights: Digest of the slim weights in the weight store, "" if none.
        run_id: Of the child run; "" without tracking.
        quantized: How its model was quantized; None: it wasn't.
        failure: Why the trial failed; None if it didn't.
        stopped: Step at which it was stopped as hopeless; None if it wasn't. What failed or was
            stopped has no rows; its curve goes as far as it came.
    """

    name: str
    pruner: str
    seed: int = 0
    budget: str = ""
    limits: tuple[Limit, ...] = ()
    counts: tuple[tuple[str, int, int], ...] = ()
    rows: tuple[ModelRow, ...] = ()
    verification: Verification | None = None
    dfe: float = 0.0
    evaluations: int = 0
    replayed: int = 0
    seconds: float = 0.0
    curve: tuple[SearchStep, ...] = ()
    model: str = ""
    masks: str = ""
    weights: str = ""
    run_id: str = ""
    quantized: QuantizedResult | None = None
    failure: str | None = None
    stopped: int | None = None

    @property
    def budget_met(self) -> bool | None:
        """Whether all limits hold on the slim model; None without a budget."""
        return all(limit.met for limit in self.limits) if self.limits else None

    def row(self, name: str) -> ModelRow | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One sample of a study.

    Attributes:
        name: Of its trial.
        study: Of which it is.
        settings: What was chosen: the pruner's type, and its keys that have spaces.
        state: "stopped": as hopeless, before its end; "failed": with a reason.
        score: Mean validation score of its winner (of a stopped one, the best so far); None: it has
            none. Likewise `loss`.
        loss: Mean validation loss.
        macs: Multiply-adds of one example.
        params: Parameters.
        dfe: Cost in dense-forward equivalents.
        failure: Why it failed; None if it didn't.
        best: No other of the study is better in every objective.
    """

    name: str
    study: str
    settings: dict[str, Any]
    state: Literal["running", "finished", "failed", "stopped"]
    score: float | None = None
    loss: float | None = None
    macs: float | None = None
    params: float | None = None
    dfe: float = 0.0
    failure: str | None = None
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """All that a job found.

    Attributes:
        name: Of the job.
        score_name: What the score is, such as "accuracy".
        dense: The dense model.
        output: Absolute folder of everything that the job wrote.
        tracking_uri: Of MLflow, passwords masked; "" without tracking.
        run_id: Of the job's run; "" without tracking.
        trials: In the order of the job; of studies, the samples that were kept, best first.
        samples: Of all studies, by number.
        sensitivity: One curve for each group; empty without the analysis.
        sensitivity_criterion: By which units were chosen, such as "l1".
        frozen: What can't be pruned.
        best: Name of the trial whose model is published; "" if none.
        model_uri: Of the published model in MLflow, "" if none.
        registered_model: Name and version in the registry, "" if not registered.
        device: On which latency was measured.
        front: Points on a front, by descending cost in multiply-adds; the table of all points is
            `results/pareto.parquet`.
        num_points: Models that were evaluated.
        dfe: Cost of everything (probes and fine-tuning too) in dense-forward equivalents, that of
            earlier runs of the job included.
        run_dfe: This run's part of it; the ledger answered the rest.
        seconds: Wall time of this run of the job.
        notes: Sentences that a reader should know, such as what isn't deterministic.
    """

    name: str
    score_name: str
    dense: ModelRow
    output: str
    tracking_uri: str = ""
    run_id: str = ""
    trials: tuple[TrialResult, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    sensitivity: tuple[Curve, ...] = ()
    sensitivity_criterion: str = ""
    frozen: tuple[FrozenLayer, ...] = ()
    best: str = ""
    model_uri: str = ""
    registered_model: str = ""
    device: str = ""
    front: tuple[Point, ...] = ()
    num_points: int = 0
    dfe: float = 0.0
    run_dfe: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def trial(self, name: str) -> TrialResult | None:
        """The trial of that name."""
        return next((trial for trial in self.trials if trial.name == name), None)

    def to_json(self) -> str:
        """Indented JSON, strictly standard: numbers that JSON lacks are "inf", "-inf" or "nan"."""
        content = {"format": FORMAT, **to_data(self)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> JobResult:
        """The inverse of `to_json`.

        Raises:
            ValueError: It isn't such JSON, or a newer version of it.
        """
        content = json.loads(text)
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"not a summary that this version of raycompress reads (format {found}, "
                f"expected {FORMAT})"
            )
        return from_data(JobResult, content)
