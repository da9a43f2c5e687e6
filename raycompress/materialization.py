"""Any point of a finished job's table as a verified model, without searching again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from raycompress.artifacts import save
from raycompress.backend import Backend
from raycompress.candidate import Candidate, Training
from raycompress.config import JobConfig
from raycompress.driver import backend_of, validate
from raycompress.errors import (
    ArtifactError,
    ConfigError,
    InterruptedJob,
    RaycompressError,
    TaskError,
)
from raycompress.finish import reconstructed, recovery
from raycompress.identity import data_digest, structure_digest, task_digest
from raycompress.ledger import Ledger
from raycompress.loading import load_source
from raycompress.measured import Finished, final_model, finish_candidate, measure_dense
from raycompress.output import lock
from raycompress.pareto import Point
from raycompress.plan import Plan
from raycompress.points import read_table
from raycompress.progress import Progress, SilentProgress
from raycompress.quantized import Quantized, quantize_candidate, time_quantized
from raycompress.results import JobResult, ModelRow, QuantizedResult, Verification
from raycompress.signals import terminable
from raycompress.storage import ObjectPath, Place, place_of, staged
from raycompress.task import SPLITS
from raycompress.trial import load_ranking, write_json
from raycompress.weights import WeightStore
from raycompress.wording import near

__all__ = ["Materialized", "materialize"]


@dataclass(frozen=True, kw_only=True)
class Materialized:
    """A point's model.

    Attributes:
        point: What the search knew of it.
        folder: Of its files: models, masks, kept channels by group, this summary.
        models: Files that `raycompress.load` reads: onto the class, and a program without it.
        score_name: What the scores are.
        rows: "dense", "masked", "slim" if channels were removed, "quantized" and "lowered" if it
            was; measured now.
        verification: Of slim against masked; None where nothing was slimmed.
        recovered: It was fine-tuned.
        quantized: How it was quantized, and its files; None: it is in float.
        notes: What a reader should know.
    """

    point: Point
    folder: str
    models: tuple[str, ...]
    score_name: str
    rows: tuple[ModelRow, ...]
    verification: Verification | None = None
    recovered: bool = False
    quantized: QuantizedResult | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)


def materialize(
    job: str | Path | ObjectPath,
    point: str,
    *,
    trial: str | None = None,
    recover: bool = False,
    quantize: bool = False,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Materialized:
    """Builds, verifies, measures and saves a point of a finished job's table.

    It is built as it was judged: from the weights, the ranking and the trained weights that the
    output holds by digest, reconstructed and recalibrated as the search did. Files go below
    `<output>/materialized/<id>`, those of a fine-tuned model below `<id>/recovered`. One with bits
    is then calibrated or trained with them and lowered, as the job says under `quantize`, whatever
    its search judged it by; the float model is there, too.

    Args:
        job: A job file, or a job's output: a folder, or its URI.
        point: Its id in `results/pareto.parquet`, or so many first characters that no other has.
        trial: Whose point, where several trials have it: its seed is that of fine-tuning.
        recover: Fine-tune it, as the job says under `recover`.
        quantize: Quantize it, as the job says, also where the point has no bits of its own.
        overrides: Of keys of the job, such as "recover.epochs=5".
        progress: Told of stages; None says nothing.

    Raises:
        ConfigError: There is no finished job, or no such point or trial.
        TaskError: Task, data or model aren't those of the job any more.
        VerificationError: The slim model doesn't compute what the masked one does, or the lowered
            one what the quantized one does.
        RaycompressError: Weights or rankings are gone, or nothing can be saved.
        InterruptedJob: It was stopped by a signal.
    """
    config = _config(place_of(job), overrides)
    plan = validate(config, tracking=False)
    summary, path = (plan.output / "results" / n for n in ("summary.json", "pareto.parquet"))
    for needed in (summary, path):
        if not needed.exists():
            raise ConfigError(f"{plan.output} holds no finished job: no file {needed}")
    points, origin = read_table(path)
    chosen = _chosen(points, point, trial, path)
    if recover and config.recover is None:
        raise ConfigError(
            "--recover: the job doesn't say how; give recover.epochs (--set recover.epochs=5)"
        )
    bits = Candidate.from_key(json.loads(chosen.candidate)).quantize
    if plan.quantize is None and (quantize or bits is not None):
        which = "--quantize" if quantize else f"--point: {chosen.id} has bits ({chosen.bits})"
        raise ConfigError(
            f"{which}: the job doesn't say how; give quantize (--set quantize.type=PTQ)"
        )
    _check_origin(plan, origin)
    own = JobResult.from_json(summary.read_text()).trial(chosen.trial)
    seed = config.seed if own is None else own.seed
    training = recovery(config, seed, origin["weights"]) if recover else Training(0.0)
    shown = progress if progress is not None else SilentProgress()
    try:
        with ExitStack() as stack:
            stack.callback(shown.close)
            stack.enter_context(lock(plan.output))
            stack.enter_context(terminable())
            work = _Work(plan, chosen, origin["weights"], training, recover, quantize, seed)
            return _materialize(work, backend_of(plan, shown, stack), shown)
    except KeyboardInterrupt:
        raise InterruptedJob("stopped; the same command starts again") from None


def _config(job: Place, overrides: Sequence[str]) -> JobConfig:
    if isinstance(job, Path):
        job = job.expanduser().absolute()
        if not job.is_dir():
            return load_source(job, overrides)[0]
    elif job.name.endswith((".yaml", ".yml")):
        return load_source(job, overrides)[0]
    if not (job / "job.yaml").exists():
        raise ConfigError(f"{job} holds no finished job: no file {job / 'job.yaml'}")
    return load_source(job / "job.yaml", overrides, str(job))[0]


def _chosen(points: Sequence[Point], name: str, trial: str | None, path: Place) -> Point:
    """The point that is asked for.

    Raises:
        ConfigError: There is none, or more than one.
    """
    trials = dict.fromkeys(p.trial for p in points if p.trial)
    if trial is not None and trial not in trials:
        known = f"; there are {', '.join(trials)}"
        raise ConfigError(f"--trial: no trial {trial!r} in {path}{near(trial, trials, known)}")
    own = [p for p in points if trial is None or p.trial == trial]
    found = {p.id: p for p in reversed(own) if name and p.id.startswith(name)}
    if not found:
        best = sorted((p for p in own if p.fronts), key=lambda p: -p.score)[:3]
        hint = f"; on the front are {', '.join(p.id for p in best)}" if best else ""
        where = f" of trial {trial}" if trial is not None else ""
        raise ConfigError(
            f"--point: no point {name!r}{where} in {path}{near(name, [p.id for p in own], hint)}"
        )
    if len(found) > 1:
        raise ConfigError(f"--point: {name!r} may be {' or '.join(sorted(found)[:5])}")
    return next(iter(found.values()))


def _check_origin(plan: Plan, origin: Mapping[str, str]) -> None:
    """Raises a TaskError if a table's points speak of another task or model."""
    data = {split: plan.task.dataset(split) for split in SPLITS}  # type: ignore[arg-type]
    now = {
        "task": (task_digest(plan.task), "its class, what it is made of, or its arguments"),
        "data": (data_digest(data), "its data"),
        "structure": (structure_digest(plan.structure), "its model's layers, or `structure`"),
    }
    for name, (digest, what) in now.items():
        if digest != origin[name]:
            raise TaskError(
                f"task {plan.config.task} isn't the one that {plan.output} was made with: {what} "
                f"changed ({name} digest {origin[name]}, now {digest}); bring it back, or run the "
                "job again"
            )


@dataclass(frozen=True)
class _Work:
    """What is to be done.

    Attributes:
        plan: The job.
        point: Chosen.
        dense: Digest of the dense weights.
        training: Of no epochs, unless it is to be recovered.
        recover: It is.
        quantize: It is quantized, also without bits of its own.
        seed: Of its trial.
    """

    plan: Plan
    point: Point
    dense: str
    training: Training
    recover: bool
    quantize: bool
    seed: int

    @property
    def folder(self) -> Place:
        """Where the model goes."""
        folder = self.plan.output / "materialized" / self.point.id
        return folder / "recovered" if self.recover else folder


def _materialize(work: _Work, backend: Backend, progress: Progress) -> Materialized:
    plan, point = work.plan, work.point
    store = WeightStore(plan.output / "weights")
    weights = store.get(work.dense)
    plan.model.load_state_dict(dict(weights.state))
    candidate = Candidate.from_key(json.loads(point.candidate))
    if store.get(candidate.weights).quantization is not None:
        raise RaycompressError(
            f"point {point.id} was trained with its bits in the search: its float model, of which "
            "it could be made, is gone"
        )
    bits, candidate = candidate.quantize, replace(candidate, quantize=None)
    ranking, made = None, None
    if candidate.ranking:
        folder = plan.output / "rankings"
        if not (folder / f"{candidate.ranking}.safetensors").exists():
            raise RaycompressError(f"ranking {candidate.ranking} is not in {folder}")
        ranking = load_ranking(candidate.ranking, folder)
    if work.recover:
        candidate = reconstructed(plan.config, candidate, work.dense)

    def on_training(step: int, num_steps: int, loss: float) -> None:
        progress.step(f"loss {loss:.4f}, step", step, num_steps)

    with (
        Ledger(plan.output / "ledger", "materialize") as ledger,
        backend.pool(plan, ledger, on_training) as pool,
    ):
        pool.share(work.dense, weights)
        if ranking is not None:
            pool.publish(ranking)
        progress.stage("Measure the dense model")
        measured = measure_dense(plan, pool, work.dense)
        progress.stage(f"Build, verify and measure {point.id}")
        name = f"point {point.id}"
        done = finish_candidate(
            plan, candidate, work.training, name, work.folder, pool, store, measured
        )
        if plan.quantize is not None and (work.quantize or bits is not None):
            progress.stage(f"Quantize {point.id}: {plan.quantize.name}")
            how, place = plan.quantize.with_bits(bits), work.folder / "quantized"
            made = quantize_candidate(
                plan, done.candidate, how, done.rows[-1], name, work.seed, place, pool, store
            )
            made = time_quantized(plan, {name: made}, pool, progress)[name]
    progress.stage("Save")
    return _saved(work, done, final_model(plan, store.get(done.candidate.weights)), made)


def _saved(work: _Work, done: Finished, model: nn.Module, made: Quantized | None) -> Materialized:
    point, task = work.point, work.plan.task
    models, notes = [], []
    with staged(work.folder) as folder:
        for name in ("model.safetensors", "model.pt2"):
            try:
                save(model, folder / name, task.example_inputs(), kept=done.counts)
                models.append(str(work.folder / name))
            except ArtifactError as error:
                notes.append(f"no {name}: {error}")
    if not models:
        raise ArtifactError(f"point {point.id} can't be saved: {'; '.join(notes)}")
    result = Materialized(
        point=point,
        folder=str(work.folder),
        models=tuple(models),
        score_name=task.score_name,
        rows=done.rows if made is None else (*done.rows, *made.rows),
        verification=done.verification,
        recovered=work.recover,
        quantized=None if made is None else made.result,
        notes=tuple(notes),
    )
    write_json(work.folder / "summary.json", asdict(result))
    return result
