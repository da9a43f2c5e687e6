"""From a job's final models to quantized ones that can be trusted: train, lower, compare, time.

What is trained and scored goes through the ledger, on the replicas; what is lowered runs here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from raycompress.candidate import Candidate
from raycompress.errors import EvaluationError
from raycompress.executor import LedgerExecutor
from raycompress.lowered import look, lower_model, time_lowered
from raycompress.measured import Measured, final_model, latency_of
from raycompress.plan import Plan
from raycompress.progress import Progress
from raycompress.quantization import Quantization
from raycompress.quantization.lowering import Lowered
from raycompress.quantized_files import write_quantized_files
from raycompress.results import QuantizedResult, TrialResult
from raycompress.storage import staged
from raycompress.structure import file_size
from raycompress.weights import WeightStore

__all__ = ["DENSE", "quantize_trials", "quantized_model"]

DENSE = "dense"
"""Name of the trial that quantizes the dense model."""


@dataclass(frozen=True)
class _Work:
    """What the stages share."""

    plan: Plan
    pool: LedgerExecutor
    store: WeightStore

    def how(self, winner: Candidate | None) -> Quantization:
        """The job's quantizer, with the bits that a search found, if one did."""
        assert self.plan.quantize is not None
        return self.plan.quantize.with_bits(None if winner is None else winner.quantize)


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
    work = _Work(plan, pool, store)
    asked = [
        (trial, winners[trial.name].trained(trial.weights) if trial.rows else None)
        for trial in trials
    ]
    if plan.quantize.section.dense or (not plan.trials and not plan.studies):
        asked.append((_dense_trial(plan, dense, pool), dense.candidate))
    done: list[TrialResult] = []
    lowered: dict[str, Lowered] = {}
    for trial, candidate in asked:
        if candidate is None:
            done.append(trial)
            continue
        progress.stage(f"Quantize {trial.name}: {plan.quantize.name}")
        try:
            how = work.how(winners.get(trial.name))
            trial, runs = _quantize(work, trial, candidate, how)
        except EvaluationError as error:  # the other trials are sound
            progress.message(str(error))
            trial, runs = replace(trial, rows=(), failure=str(error)), None
        done.append(trial)
        if runs is not None:
            lowered[trial.name] = runs
    if lowered:
        progress.stage(f"Time models on {plan.quantize.section.lower}")
    return _timed(plan, done, lowered)


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


def _quantize(
    work: _Work, trial: TrialResult, candidate: Candidate, how: Quantization
) -> tuple[TrialResult, Lowered | None]:
    plan, last = work.plan, trial.rows[-1]
    assert plan.quantize is not None
    section = plan.quantize.section
    training = plan.quantize.training(trial.seed)
    asked = replace(candidate, quantize=how, training=training)
    judged = work.pool.evaluate([asked])[0]
    if judged.failure is not None or judged.weights is None:
        raise EvaluationError(f"quantizing {trial.name} failed: {judged.failure}")
    final = candidate.trained(judged.weights)
    test = work.pool.evaluate([final], "test")[0]
    if test.failure is not None:
        raise EvaluationError(f"evaluating {trial.name}, quantized, failed: {test.failure}")
    float_model = final_model(plan, work.store.get(candidate.weights))
    model = quantized_model(float_model, how, work.store.get(judged.weights).state)
    row = replace(
        last,
        name="quantized",
        score_validation=judged.score,
        score_test=test.score,
        file_bytes=file_size(model),
        latency=(),
    )
    place = plan.output / "results" / trial.name / "quantized"
    with staged(place) as folder:
        missing = write_quantized_files(plan, model, folder)
        lowered = None
        if section.lower != "none":
            lowered = lower_model(plan, how, model, float_model, folder)
    found = QuantizedResult(
        quantizer=plan.quantize.name,
        bits=_bits(how),
        weights=judged.weights,
        num_layers=len(how.choices),
        in_float=plan.quantize.floats,
        folder=str(place),
        no_calibration=missing,
    )
    if lowered is None:
        return replace(trial, rows=(*trial.rows, row), quantized=found), None
    seen = look(plan, model, lowered, trial.name)
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
    return replace(trial, rows=(*trial.rows, row, on_runtime), quantized=found), lowered


def _timed(
    plan: Plan, trials: Sequence[TrialResult], lowered: Mapping[str, Lowered]
) -> list[TrialResult]:
    """The same with latency, all lowered models timed in turns."""
    own, floats = time_lowered(plan, lowered)
    done = []
    for trial in trials:
        if trial.name in own:
            assert trial.quantized is not None
            rows = (*trial.rows[:-1], replace(trial.rows[-1], latency=own[trial.name]))
            quantized = replace(trial.quantized, float_latency=floats[trial.name])
            trial = replace(trial, rows=rows, quantized=quantized)
        done.append(trial)
    return done


def _bits(how: Quantization) -> str:
    """Such as "W8 A8", or "W2-8 A8" where layers differ."""
    words = []
    for letter, part in (("W", "weight"), ("A", "input"), ("O", "output")):
        known = sorted({b for _, bits in how.choices if (b := getattr(bits, part)) is not None})
        if known:
            ends = str(known[0]) if len(known) == 1 else f"{known[0]}-{known[-1]}"
            words.append(f"{letter}{ends}")
    return " ".join(words)
