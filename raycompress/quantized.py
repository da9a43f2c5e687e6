"""From a job's final models to quantized ones that can be trusted: train, lower, compare, time.

What is trained and scored goes through the ledger, on the replicas, and so is what is timed, where
other latencies are measured. What is lowered to be kept is lowered and compared here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from raycompress.candidate import Candidate
from raycompress.errors import EvaluationError, RaycompressError, StorageError
from raycompress.executor import LedgerExecutor
from raycompress.lowered import look, lower_model
from raycompress.measured import Measured, final_model, latency_of
from raycompress.on_runtime import FLOAT_OF
from raycompress.plan import Plan
from raycompress.progress import Progress
from raycompress.quantization import Quantization
from raycompress.quantization.quantizer import default_layers
from raycompress.quantized_files import write_quantized_files
from raycompress.results import Latency, ModelRow, QuantizedResult, TrialResult
from raycompress.storage import Place, staged
from raycompress.structure import file_size
from raycompress.weights import WeightStore

__all__ = [
    "DENSE",
    "Quantized",
    "quantize_candidate",
    "quantize_trials",
    "quantized_model",
    "time_quantized",
]

DENSE = "dense"
"""Name of the trial that quantizes the dense model."""


@dataclass(frozen=True)
class Quantized:
    """A model that was quantized.

    Attributes:
        rows: "quantized", and "lowered" if it was.
        result: How, and what a runtime makes of it.
    """

    rows: tuple[ModelRow, ...]
    result: QuantizedResult


def quantize_trials(
    plan: Plan,
    trials: Sequence[TrialResult],
    winners: Mapping[str, Candidate],
    pool: LedgerExecutor,
    store: WeightStore,
    dense: Measured,
    progress: Progress,
) -> list[TrialResult]:
    """Quantizes what each trial ended with, and the dense model where the job asks for it.

    Args:
        plan: Of a job with `quantize`.
        trials: Finished; those without a model stay as they are.
        winners: What the search of each returned; its ranking is published.
        pool: Trains and scores.
        store: Holds the weights.
        dense: To compare with.
        progress: Told of stages.

    Returns:
        The trials, with rows "quantized" and "lowered"; the dense model is one more.

    Raises:
        EvaluationError: No model could be quantized.
        VerificationError: A lowered model isn't the one that was quantized, or not in integers.
    """
    assert plan.quantize is not None
    asked = [
        (trial, winners[trial.name].trained(trial.weights) if trial.rows else None)
        for trial in trials
    ]
    if plan.quantize.section.dense or (not plan.trials and not plan.studies):
        asked.append((_dense_trial(plan, dense, pool), dense.candidate))
    done: list[TrialResult] = []
    made: dict[str, Quantized] = {}
    for trial, candidate in asked:
        if candidate is not None:
            progress.stage(f"Quantize {trial.name}: {plan.quantize.name}")
            winner = winners.get(trial.name)
            how = plan.quantize.with_bits(None if winner is None else winner.quantize)
            place = plan.output / "results" / trial.name / "quantized"
            try:
                made[trial.name] = quantize_candidate(
                    plan, candidate, how, trial.rows[-1], trial.name, trial.seed, place, pool, store
                )
            except EvaluationError as error:  # the other trials are sound
                progress.message(str(error))
                trial = replace(trial, rows=(), failure=str(error))
        done.append(trial)
    if any(_on_kernels(each) for each in made.values()):
        progress.stage(f"Time models on {plan.quantize.section.lower}")
        made = time_quantized(plan, made, pool, progress)
    return [
        replace(trial, rows=(*trial.rows, *own.rows), quantized=own.result)
        if (own := made.get(trial.name)) is not None
        else trial
        for trial in done
    ]


def quantized_model(
    float_model: nn.Module, how: Quantization, state: Mapping[str, Tensor]
) -> nn.Module:
    """A quantized model from its stored weights, on the CPU, in eval mode; the float one stays."""
    model = copy.deepcopy(float_model)
    how.restore(model, state)
    return model.eval()


def _dense_trial(plan: Plan, dense: Measured, pool: LedgerExecutor) -> TrialResult:
    """The dense model as a trial that pruned nothing."""
    settings = plan.config.latency
    timed = pool.latency(
        {DENSE: dense.candidate}, settings.batch_sizes, settings.repeats, settings.max_seconds
    )
    row = dense.row(latency_of(timed, DENSE))
    return TrialResult(name=DENSE, pruner="", rows=(row,), weights=dense.candidate.weights)


def quantize_candidate(
    plan: Plan,
    candidate: Candidate,
    how: Quantization,
    last: ModelRow,
    name: str,
    seed: int,
    place: Place,
    pool: LedgerExecutor,
    store: WeightStore,
) -> Quantized:
    """Quantizes a float model, trains it, and lowers it, as the job says.

    Args:
        plan: Of a job with `quantize`.
        candidate: Float weights, slim or masked.
        how: With the bits of its layers.
        last: The float model's row.
        name: For messages.
        seed: Of the order of examples.
        place: Of its files.
        pool: Trains and scores.
        store: Holds the weights.

    Raises:
        EvaluationError: It couldn't be quantized or trained.
        VerificationError: The lowered model isn't the one that was quantized, or not in integers.
    """
    assert plan.quantize is not None
    section = plan.quantize.section
    asked = replace(candidate, quantize=how, training=plan.quantize.training(seed))
    judged = pool.evaluate([asked])[0]
    if judged.failure is not None or judged.weights is None:
        raise EvaluationError(f"quantizing {name} failed: {judged.failure}")
    final = candidate.trained(judged.weights)
    test = pool.evaluate([final], "test")[0]
    if test.failure is not None:
        raise EvaluationError(f"evaluating {name}, quantized, failed: {test.failure}")
    float_model = final_model(plan, store.get(candidate.weights))
    model = quantized_model(float_model, how, store.get(judged.weights).state)
    row = replace(
        last,
        name="quantized",
        score_validation=judged.score,
        score_test=test.score,
        file_bytes=file_size(model),
        latency=(),
    )
    with staged(place) as folder:
        missing = write_quantized_files(plan, model, folder)
        lowered = None
        if section.lower != "none":
            lowered = lower_model(plan, how, model, float_model, folder)
    found = QuantizedResult(
        quantizer=plan.quantize.name,
        bits=how.words(),
        weights=judged.weights,
        num_layers=len(how.choices),
        in_float=plan.quantize.floats,
        folder=str(place),
        no_calibration=missing,
        kept_float=tuple(n for n in default_layers(float_model) if n not in dict(how.choices)),
    )
    if lowered is None:
        return Quantized((row,), found)
    seen = look(plan, model, lowered, name)
    found = replace(
        found,
        backend=lowered.backend,
        runs=lowered.runs,
        layers_asked=len(lowered.layers_asked),
        layers_integer=len(lowered.layers_integer),
        agreement=seen.agreement,
        difference=seen.difference,
        file=str(place / lowered.path.name),
        file_bytes=lowered.file_bytes,
        float_bytes=lowered.reference_bytes,
    )
    on_runtime = replace(
        row,
        name="lowered",
        score_validation=seen.validation,
        score_test=seen.test,
        file_bytes=lowered.file_bytes,
    )
    return Quantized((row, on_runtime), found)


def time_quantized(
    plan: Plan, made: Mapping[str, Quantized], pool: LedgerExecutor, progress: Progress
) -> dict[str, Quantized]:
    """The same with latency on the job's backend, all timed in turns with their float models.

    Args:
        plan: Of a job that lowers.
        made: By name.
        pool: Times them, lowered there from the same weights.
        progress: Told of those that can't be timed there; they have no latency.
    """
    assert plan.quantize is not None
    settings = plan.config.latency
    asked = {name: each for name, each in made.items() if _on_kernels(each)}
    if not asked:
        return dict(made)
    candidates = {name: Candidate(each.result.weights) for name, each in asked.items()}
    backend = plan.quantize.section.lower
    try:
        rows = pool.latency(
            candidates | {FLOAT_OF + name: candidate for name, candidate in candidates.items()},
            settings.batch_sizes,
            settings.repeats,
            settings.max_seconds,
            backend,
        )
    except StorageError:
        raise
    except RaycompressError as error:  # the models are made, and sound
        progress.message(f"timing on {backend} failed: {error}")
        return dict(made)
    for name, reason in {row.name: row.failure for row in rows if row.failure}.items():
        progress.message(f"timing {name} on {backend} failed: {reason}")
    rows = [row for row in rows if not row.failure]
    present = {row.name for row in rows}  # one without the other says nothing
    asked = {n: each for n, each in asked.items() if {n, FLOAT_OF + n} <= present}

    def of(name: str) -> tuple[Latency, ...]:
        # Memory that a runtime takes by itself isn't seen.
        return tuple(replace(each, peak_bytes=0) for each in latency_of(rows, name))

    timed = dict(made)
    for name, each in asked.items():
        *others, last = each.rows
        result = replace(each.result, float_latency=of(FLOAT_OF + name))
        timed[name] = Quantized((*others, replace(last, latency=of(name))), result)
    return timed


def _on_kernels(made: Quantized) -> bool:
    """Whether it runs in integers; what runs in simulation has no time to speak of."""
    return bool(made.result.backend) and made.result.runs == "integers"
