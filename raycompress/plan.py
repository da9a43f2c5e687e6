"""From a job's plain data to a plan: everything that can fail early has been tried.

Nothing here starts Ray, opens MLflow, trains, or writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycompress.analysis.sensitivity import Sensitivity
from raycompress.budget import Budget, Pricing
from raycompress.candidate import Ranking, Trial
from raycompress.config import JobConfig, TrainingConfig, TuneConfig
from raycompress.errors import ConfigError, RaycompressError, StructureError, TaskError
from raycompress.hiding import hidden
from raycompress.importing import resolve, resolve_function
from raycompress.loading import build_pruner
from raycompress.output import check_output
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.quantize_plan import QuantizePlan, check_found_bits, plan_quantize
from raycompress.state import load_state
from raycompress.storage import Place
from raycompress.structure import Structure, analyze
from raycompress.task import Split, Task, check_task
from raycompress.tuning import OBJECTIVES, TPE, Grid, Random, Searcher, SearchSpace
from raycompress.tuning.entries import Point, corners, find_spaces, has_spaces, spread
from raycompress.weights import WeightStore
from raycompress.wording import near

__all__ = ["Plan", "StudyPlan", "TrialPlan", "build_task", "check_trial", "prepare"]


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """One pruner with one budget and one seed.

    Attributes:
        name: Unique in the job and the same in every run of it; fit for files.
        pruner: Constructed, for checks and display.
        entry: The pruner as the job gives it; what travels to the trial's process.
        budget: What may be kept; None: the pruner's own sparsity decides.
        budget_entry: The budget as the job gives it.
        seed: Of the search.
        train: Training of the winner before it is judged; None: none.
    """

    name: str
    pruner: Pruner
    entry: Mapping[str, Any]
    budget: Budget | None
    budget_entry: Mapping[str, Any] | None
    seed: int
    train: TrainingConfig | None = None


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Samples of a space at one budget with one seed.

    Attributes:
        name: Unique in the job and the same in every run of it; fit for files.
        space: What is searched.
        tune: How.
        budget: What each sample may keep; None: their own sparsities decide.
        budget_entry: The budget as the job gives it.
        seed: Of the searcher, and of the samples' own searches.
    """

    name: str
    space: SearchSpace
    tune: TuneConfig
    budget: Budget | None
    budget_entry: Mapping[str, Any] | None
    seed: int

    def trial(self, number: int, point: Point) -> TrialPlan:
        """A sample as a trial."""
        entry = self.space.entry(point)
        return TrialPlan(
            name=f"{self.name}-{number:03d}",
            pruner=build_pruner(entry),
            entry=entry,
            budget=self.budget,
            budget_entry=self.budget_entry,
            seed=self.seed,
            train=self.tune.train,
        )

    def searcher(self) -> Searcher:
        """Proposes its samples; not for searchers of Ray Tune."""
        if self.tune.searcher == "random":
            return Random(self.space, self.seed)
        if self.tune.searcher == "grid":
            return Grid(self.space)
        return TPE(self.space, self.seed, tuple(OBJECTIVES[name] for name in self.tune.objectives))

    def describe(self) -> str:
        """What it does, in words."""
        num = self.tune.num_samples
        if num is None:
            num = sum(1 for _ in self.space.points())
        names = list(self.space.parameters())
        what = ", ".join(names) if len(names) <= 8 else f"{len(names)} parameters"
        return f"{num} samples by {self.tune.searcher} of {what}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A validated job.

    Attributes:
        config: As given.
        task: Constructed in this process.
        model: With the weights that the job starts from, on the CPU, in eval mode.
        structure: Its analysis.
        sensitivity: The analysis to run first, if any.
        trials: In the order of the job.
        studies: In the order of the job; where there are any, their samples are the trials.
        checked: Trials that were tried before anything started: all, and the corners of spaces.
        output: Of everything that the job writes: an absolute folder, or one in an object store.
        quantize: How final models are quantized, if they are.
    """

    config: JobConfig
    task: Task
    model: nn.Module
    structure: Structure
    sensitivity: Sensitivity | None
    trials: tuple[TrialPlan, ...]
    studies: tuple[StudyPlan, ...]
    checked: tuple[TrialPlan, ...]
    output: Place
    quantize: QuantizePlan | None = None


class _Nobody:
    """Stands for an executor while a plan is checked: publishes to no one, answers nothing."""

    num_shards = 1

    def publish(self, ranking: Ranking) -> None:
        """Nothing."""

    def evaluate(self, candidates: object, split: Split = "validation") -> list[Trial]:
        """Never called: checks stop before the first evaluation."""
        raise AssertionError("a check evaluates nothing")

    def timed(self, asked: object) -> list[Trial]:
        """Never called either."""
        raise AssertionError("a check times nothing")


class _Free:
    """Stands for a latency table before it is measured: no limit on latency is out of reach."""

    def latency_ms(self, kept: Mapping[str, int] | None = None) -> float:
        """Nothing."""
        return 0.0


def prepare(config: JobConfig) -> Plan:
    """Validates a job and plans it.

    Raises:
        InputError: With what is wrong and what to do about it.
    """
    output = check_output(config)
    task = build_task(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            model = task.build_model()
        except RaycompressError:
            raise
        except Exception as error:
            raise TaskError(
                f"task {config.task}: build_model failed: {type(error).__name__}: {error}"
            ) from error
    check_task(task, model)
    model.eval()
    if config.model.weights is not None:
        load_state(model, Path(config.model.weights).expanduser())
    try:
        structure = analyze(
            model,
            task.example_inputs(),
            ignore=config.structure.ignore,
            heads=config.structure.heads,
            form="module",
        )
    except StructureError as error:
        if "ignore" not in str(error):
            raise
        raise ConfigError(f"structure.{error}") from error
    problem = Problem(
        model=model,
        structure=structure,
        weights="",
        executor=_Nobody(),
        store=WeightStore(output / "weights"),
        targets=config.targets,
    )
    sensitivity = None
    if config.sensitivity is not None:
        sensitivity = Sensitivity(**asdict(config.sensitivity))
        sensitivity.units(problem)
    trials = () if config.sampled else _trials(config)
    studies = _studies(config, problem) if config.sampled else ()
    plan = Plan(
        config=config,
        task=task,
        model=model,
        structure=structure,
        sensitivity=sensitivity,
        trials=trials,
        studies=studies,
        checked=_corners(config) if config.sampled else trials,
        output=output,
        quantize=plan_quantize(config, model, task),
    )
    if config.recover is not None and config.recover.distill is not None:
        _check_features(model, config.recover.distill.features)
    pruners: list[Pruner] = []  # each once: its bits don't depend on budget and seed
    for trial in plan.checked:
        if trial.pruner not in pruners:
            pruners.append(trial.pruner)
            check_found_bits(plan.quantize, trial.pruner, problem)
        check_trial(plan, trial, _Free())
    return plan


def _check_features(model: nn.Module, features: tuple[str, ...]) -> None:
    known = [name for name, _ in model.named_modules()]
    for name in features:
        if name not in known:
            raise ConfigError(
                f"recover.distill.features: {name!r} is no module of the model{near(name, known)}"
            )


def check_trial(plan: Plan, trial: TrialPlan, latency: Pricing) -> None:
    """Raises an InputError if a trial's pruner can't work; evaluates nothing."""
    trial.pruner.check(
        Problem(
            model=plan.model,
            structure=plan.structure,
            weights="",
            executor=_Nobody(),
            store=WeightStore(plan.output / "weights"),
            targets=plan.config.targets,
            budget=trial.budget,
            seed=trial.seed,
            latency=latency,
        )
    )


def build_task(config: JobConfig) -> Task:
    """Constructs the job's task.

    Raises:
        ConfigError: It can't be imported, or isn't a Task.
        TaskError: Its constructor refuses `task_args`.
    """
    cls = resolve(config.task, Task)
    try:
        task: Task = cls(**config.task_args)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"task {config.task} can't be constructed with task_args "
            f"{hidden(config.task_args)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return task


def _trials(config: JobConfig) -> tuple[TrialPlan, ...]:
    trials: list[TrialPlan] = []
    budgets: list[dict[str, Any] | None] = [*config.budgets] or [None]
    for index, entry in enumerate(config.pruners):
        pruner = build_pruner(entry, f"pruners[{index}]")
        for position, values in enumerate(budgets):
            budget = None if values is None else Budget.of(values, f"budgets[{position}]")
            for seed in config.seeds:
                parts = [type(pruner).__name__]
                if budget is not None:
                    parts.append(budget.label)
                if len(config.seeds) > 1:
                    parts.append(f"seed{seed}")
                base = "-".join(parts)
                same = sum(t.name == base or t.name.startswith(f"{base}.") for t in trials)
                trials.append(
                    TrialPlan(
                        name=base if not same else f"{base}.{same + 1}",
                        pruner=pruner,
                        entry=entry,
                        budget=budget,
                        budget_entry=values,
                        seed=seed,
                    )
                )
    return tuple(trials)


def _studies(config: JobConfig, problem: Problem) -> tuple[StudyPlan, ...]:
    """One for each budget and seed."""
    assert config.tune is not None
    entries: list[dict[str, Any]] = [dict(entry) for entry in config.pruners]
    if any(has_spaces(entry) for entry in entries):
        groups = [problem.structure.group(name) for name in problem.groups()]
        entries = [spread(e, groups, ("pruners", i)) for i, e in enumerate(entries)]
    space = SearchSpace.of(entries)
    if not space.parameters():
        raise ConfigError("tune.num_samples: one pruner without spaces has nothing to sample")
    if config.tune.searcher == "grid":
        next(space.points(), None)
    elif ":" in config.tune.searcher:
        resolve_function(config.tune.searcher, "tune.searcher")
    studies: list[StudyPlan] = []
    budgets: list[dict[str, Any] | None] = [*config.budgets] or [None]
    for position, values in enumerate(budgets):
        budget = None if values is None else Budget.of(values, f"budgets[{position}]")
        for seed in config.seeds:
            parts = ["tuned"]
            if budget is not None:
                parts.append(budget.label)
            if len(config.seeds) > 1:
                parts.append(f"seed{seed}")
            name = "-".join(parts)
            same = sum(s.name == name or s.name.startswith(f"{name}.") for s in studies)
            studies.append(
                StudyPlan(
                    name=name if not same else f"{name}.{same + 1}",
                    space=space,
                    tune=config.tune,
                    budget=budget,
                    budget_entry=values,
                    seed=seed,
                )
            )
    return tuple(studies)


def _corners(config: JobConfig) -> tuple[TrialPlan, ...]:
    """Trials at the ends of every space, at each budget."""
    entries = [
        corner
        for index, entry in enumerate(config.pruners)
        for corner in corners(entry, find_spaces(entry, ("pruners", index)))
    ]
    return _trials(replace(config, pruners=tuple(entries), seeds=config.seeds[:1], tune=None))
