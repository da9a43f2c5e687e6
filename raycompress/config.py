"""The job, as plain data: what a YAML file says, and what `raycompress.run` takes.

Every field is a YAML key. Values are checked where they are made (`__post_init__`); types, unknown
keys and lines of the file are the loader's business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raycompress.criteria import criterion
from raycompress.errors import ConfigError
from raycompress.targets import Target
from raycompress.tuning import OBJECTIVES, Halving
from raycompress.tuning.entries import has_spaces
from raycompress.units import Evaluation
from raycompress.wording import near

__all__ = [
    "ClusterConfig",
    "DistillConfig",
    "JobConfig",
    "LatencyConfig",
    "ModelConfig",
    "RecoverConfig",
    "SensitivityConfig",
    "StructureConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TuneConfig",
]


def _positive(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{key} must be above 0, got {value:g}")


def _check_resources(
    key: str, resources: Mapping[str, float], elsewhere: Sequence[str] = ()
) -> None:
    """Raises a ConfigError unless Ray takes these resources of an actor."""
    for name, amount in resources.items():
        if name in elsewhere:
            raise ConfigError(f"{key}: {name} is given as cluster.{name.lower()}s")
        if not name.strip() or name in ("memory", "object_store_memory"):
            raise ConfigError(f"{key} must name resources of Ray's nodes, got {name!r}")
        if not 0 < amount < math.inf or (amount > 1 and amount != int(amount)):
            raise ConfigError(f"{key}: {name} must be above 0, and whole above 1, got {amount:g}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run.

    Attributes:
        epochs: Passes over the train split, above 0; a fraction ends within a pass.
        lr: Peak learning rate, above 0; None takes the task's own.
    """

    epochs: float
    lr: float | None = None

    def __post_init__(self) -> None:
        _positive("epochs", self.epochs)
        if self.lr is not None:
            _positive("lr", self.lr)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Training toward the dense model's outputs: see `raycompress.training.Distillation`.

    Attributes:
        temperature: Of the outputs, above 0.
        weight: Of the dense model's outputs against the task's own loss, in (0, 1].
        features: Names of modules whose outputs are compared as well; they must keep their shape.
        feature_weight: Of each feature's term, above 0.
    """

    temperature: float = 4.0
    weight: float = 0.9
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        _positive("feature_weight", self.feature_weight)
        if not 0 < self.weight <= 1:
            raise ConfigError(f"weight must be in (0, 1], got {self.weight:g}")


@dataclass(frozen=True, kw_only=True)
class RecoverConfig(TrainingConfig):
    """Fine-tuning of a winner.

    Attributes:
        distill: Distil from the dense model; None: train on the task's own loss alone.
    """

    distill: DistillConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the dense weights come from.

    Attributes:
        weights: A state dict to load into `build_model()`: .safetensors, or .pt/.pth read without
            unpickling code. None: what `build_model()` returns is trained already, or `pretrain`.
        pretrain: Train first, with the task's own loop; None: no.
    """

    weights: str | None = None
    pretrain: TrainingConfig | None = None


@dataclass(frozen=True, kw_only=True)
class StructureConfig:
    """What may leave the model at all, whatever pruners and targets ask for.

    Attributes:
        ignore: Module names (a name covers what is below it) or class names that are protected.
        heads: Attention loses whole heads ("whole") or the same positions of every head ("dim").
    """

    ignore: tuple[str, ...] = ()
    heads: Literal["whole", "dim"] = "whole"


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """Score of the model with one channel group (or layer) pruned, at each sparsity.

    Attributes:
        criterion: A name, or an import path: "l1" and others prune channels, "level" and others
            single weights of layers.
        sparsities: Fractions removed, ascending, each in (0, 1).
        early_stop: Stop a group's curve when the score is below `early_stop_value` ("minimize"),
            above it ("maximize"), more than it below the dense score ("dropped"), or above
            ("raised"); None: never.
        early_stop_value: In the unit of the score.
        layers: Only the groups of these layers; empty: all that the job's targets select.
    """

    criterion: str = "l1"
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    early_stop: Literal["minimize", "maximize", "dropped", "raised"] | None = None
    early_stop_value: float | None = None
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        criterion(self.criterion, "sensitivity.criterion")
        if not self.sparsities or list(self.sparsities) != sorted(set(self.sparsities)):
            raise ConfigError(
                "sensitivity.sparsities must be ascending and not empty, "
                f"got {list(self.sparsities)}"
            )
        if not all(0 < s < 1 for s in self.sparsities):
            raise ConfigError(
                f"sensitivity.sparsities must be in (0, 1), got {list(self.sparsities)}"
            )
        if (self.early_stop is None) != (self.early_stop_value is None):
            raise ConfigError("sensitivity.early_stop and early_stop_value go together")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Samples of the space that pruners span, and when hopeless trials are stopped.

    A pruner with a space in place of a value, such as `lr: {loguniform: [1e-3, 1e-1]}` (see
    `raycompress.tuning.spaces`), stands for many. Each budget with each seed is then a study, whose
    samples are trials: a searcher proposes their values, and the best are recovered and measured.

    Attributes:
        num_samples: Of each study; None: all points of a grid. Without spaces, None: each pruner
            runs at each budget with each seed, as without `tune`.
        searcher: "tpe" (Optuna), "random", "grid", or the import path of a function that makes one
            of Ray Tune's searchers: `make(space, metric, mode, seed)`.
        objectives: What makes a sample good: "score", "loss" (lower), "macs", "params" (fewer).
            With several, none of the best is worse than another in all of them.
        train: Fine-tuning of each sample before it is judged; None: as its pruner leaves it.
        keep: How many samples of each study are recovered, measured and saved, best first.
        scheduler: "asha": trials whose best loss within the budget is behind those of the same
            budget (in the same study) at the same step are stopped; "none": none are.
        grace: Steps before a trial can be stopped: the first rung; then times `factor`.
        factor: One trial in so many goes on at each rung.
    """

    num_samples: int | None = None
    searcher: str = "tpe"
    objectives: tuple[Literal["score", "loss", "macs", "params"], ...] = ("score",)
    train: TrainingConfig | None = None
    keep: int = 1
    scheduler: Literal["none", "asha"] = "none"
    grace: int = 3
    factor: int = 3

    def __post_init__(self) -> None:
        if self.num_samples is not None:
            _positive("tune.num_samples", self.num_samples)
        _positive("tune.keep", self.keep)
        known = ("tpe", "random", "grid")
        if self.searcher not in known and not re.fullmatch(r"[\w.]+:[\w.]+", self.searcher):
            allowed = f"; allowed: {', '.join(known)}, or an import path 'package.module:function'"
            raise ConfigError(
                f"tune.searcher: no searcher {self.searcher!r}{near(self.searcher, known, allowed)}"
            )
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(
                f"tune.objectives must be different ones of {', '.join(OBJECTIVES)}, "
                f"got {list(self.objectives)}"
            )
        if self.scheduler == "asha":
            if len(self.objectives) > 1:
                raise ConfigError(
                    "tune.scheduler 'asha' compares losses, and can't judge by several objectives; "
                    f"got objectives {list(self.objectives)}"
                )
            try:
                Halving(self.grace, self.factor)
            except ConfigError as error:
                raise ConfigError(f"tune.{error}") from None


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """How latency is measured, on a replica with nothing else running on it.

    Attributes:
        batch_sizes: Examples in a forward pass; one row of the report for each. Budgets of
            latency_ms hold at the first.
        repeats: Timed passes of each model at each batch size, interleaved.
        max_seconds: Time for one measurement, of a trial's models or of the latency table; fewer
            passes are timed if it is short.
        resources: Ray resources of the replica that measures, such as {"phone": 1} of the nodes
            that are the target devices; CPU and GPU are as in `cluster` where they aren't given.
            Empty: any replica measures.
    """

    batch_sizes: tuple[int, ...] = (1, 64)
    repeats: int = 30
    max_seconds: float = 300.0
    resources: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_resources("latency.resources", self.resources)
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(
                f"latency.batch_sizes must be 1 or more, got {list(self.batch_sizes)}"
            )
        _positive("latency.repeats", self.repeats)
        _positive("latency.max_seconds", self.max_seconds)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the work runs.

    Attributes:
        executor: "ray": on a cluster, or on a local Ray that starts by itself; "local": in this
            process, on the CPU, one unit after the other.
        address: Of a running cluster; None: the one that Ray finds (as in a submitted job), or a
            local one.
        replicas: Model replicas of each trial.
        extra_replicas: More of them, at most, while the cluster has room that nobody asks for, as
            when nodes join; given back as soon as somebody does. Results don't depend on them.
        cpus: CPU cores of each replica.
        gpus: GPUs of each replica; a fraction shares one.
        resources: Custom Ray resources of each replica, such as {"a100": 0.01}, which keeps them on
            nodes of one kind.
        max_concurrent: Trials at once; None: as many as fit.
        start_timeout: Seconds within which replicas must be up.
        unit_timeout: Seconds after which a unit of work counts as hung; None: no deadline.
    """

    executor: Literal["ray", "local"] = "ray"
    address: str | None = None
    replicas: int = 2
    extra_replicas: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    max_concurrent: int | None = None
    start_timeout: float = 120.0
    unit_timeout: float | None = None

    def __post_init__(self) -> None:
        for name in ("replicas", "cpus", "start_timeout"):
            _positive(f"cluster.{name}", getattr(self, name))
        for name in ("max_concurrent", "unit_timeout"):
            if getattr(self, name) is not None:
                _positive(f"cluster.{name}", getattr(self, name))
        if self.extra_replicas < 0:
            raise ConfigError(
                f"cluster.extra_replicas must be 0 or more, got {self.extra_replicas}"
            )
        _check_resources("cluster.resources", self.resources, ("CPU", "GPU"))
        if self.gpus < 0:
            raise ConfigError(f"cluster.gpus must be 0 or more, got {self.gpus:g}")
        if self.gpus and self.executor == "local":
            raise ConfigError(
                f"cluster.gpus must be 0 with executor 'local', which runs on the CPU, got "
                f"{self.gpus:g}; executor 'ray' starts a local Ray by itself"
            )
        if self.resources and self.executor == "local":
            raise ConfigError(
                "cluster.resources must be empty with executor 'local', which asks Ray for "
                f"nothing, got {self.resources}"
            )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where results are kept.

    Attributes:
        uri: An MLflow tracking URI; None: a SQLite file and artifacts below the output; "none":
            no tracking.
        experiment: Name of the MLflow experiment; None: the job's name.
        registered_model: Also register the slim model under this name.
        wait: Seconds that a job which is done waits for a store that is away.
    """

    uri: str | None = None
    experiment: str | None = None
    registered_model: str | None = None
    wait: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.wait < math.inf:
            raise ConfigError(f"tracking.wait must be at least 0 seconds, got {self.wait}")
        name = self.registered_model
        if name is not None and (not name.strip() or set(name) & set("/:") or len(name) > 250):
            raise ConfigError(
                "tracking.registered_model must be a name that MLflow takes, without '/' and ':', "
                f"got {name!r}"
            )


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One compression job.

    Each of `pruners` runs at each of `budgets` with each of `seeds`: one trial each.

    Attributes:
        name: Names the output folder, the MLflow experiment and the run.
        task: Import path of the Task, "package.module:Class".
        task_args: Keyword arguments of its constructor.
        seed: Of everything that is random outside of trials.
        model: Where the dense weights come from.
        structure: What may leave the model at all.
        targets: Which layers may be pruned (NNI's config_list); empty: all.
        sensitivity: Analyse the groups first; None: no.
        pruners: Each a mapping with `type` (a name of raycompress.pruning, or an import path) and
            the pruner's own keys.
        tune: Samples of the pruners' spaces; None: they hold no spaces.
        budgets: Each a mapping of resource (macs, params, latency_ms) to what is kept, such as
            {"macs": "50%"}; empty: for pruners that have a sparsity of their own.
        seeds: Seeds of the trials.
        reconstruct: Let the layers of each winner imitate the dense ones by least squares on
            calibration data, before it is fine-tuned.
        recover: Fine-tune each winner; None: no.
        quantize: Quantize each final model (without pruners: the dense one) and bring it to a
            backend: a mapping with `type` (a name of raycompress.quantization, or an import path),
            the quantizer's own keys, and those of `QuantizeSection`; None: no.
        evaluation: How candidates are evaluated.
        latency: How latency is measured.
        cluster: Where the work runs.
        tracking: Where results are kept.
        output: Folder of everything that the job writes, on storage that all nodes see: a path, or
            s3://bucket/folder or gs://bucket/folder; None: ~/.raycompress/<name>.
    """

    name: str
    task: str
    task_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    model: ModelConfig = ModelConfig()
    structure: StructureConfig = StructureConfig()
    targets: tuple[Target, ...] = ()
    sensitivity: SensitivityConfig | None = None
    pruners: tuple[dict[str, Any], ...] = ()
    tune: TuneConfig | None = None
    budgets: tuple[dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)
    reconstruct: bool = False
    recover: RecoverConfig | None = None
    quantize: dict[str, Any] | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    latency: LatencyConfig = LatencyConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: str | None = None

    def __post_init__(self) -> None:
        bad = set(self.name) & set('/\\:*?"<>|') or not self.name.isprintable()
        if not self.name.strip() or bad or self.name.startswith(".") or len(self.name) > 100:
            raise ConfigError(f"name must be usable as a folder's name, got {self.name!r}")
        if not self.pruners and self.sensitivity is None and self.quantize is None:
            raise ConfigError("a job needs pruners, sensitivity or quantize")
        if not self.seeds:
            raise ConfigError("seeds must not be empty")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must differ, got {list(self.seeds)}")
        if self.latency.resources and self.cluster.executor == "local":
            raise ConfigError(
                "latency: resources must be empty with executor 'local', which measures in this "
                f"process, got {self.latency.resources}"
            )
        self._check_tune()

    @property
    def sampled(self) -> bool:
        """Whether trials are samples of studies."""
        spaces = any(has_spaces(entry) for entry in self.pruners)
        return self.tune is not None and (spaces or self.tune.num_samples is not None)

    def _check_tune(self) -> None:
        spaces = [i for i, entry in enumerate(self.pruners) if has_spaces(entry)]
        if self.tune is None:
            if spaces:
                raise ConfigError(
                    f"pruners[{spaces[0]}] holds a space, which needs tune, such as "
                    "tune: {num_samples: 40}"
                )
            return
        if not self.pruners:
            raise ConfigError("tune needs pruners, with spaces such as {choice: [l1, l2]}")
        if not self.sampled:
            if self.tune.scheduler == "none":
                raise ConfigError(
                    "tune has nothing to do: pruners hold no space such as {choice: [l1, l2]}, and "
                    "tune gives neither num_samples nor scheduler: asha"
                )
        elif self.tune.num_samples is None and self.tune.searcher != "grid":
            raise ConfigError("tune.num_samples is missing: of each study, such as 40")
        if ":" in self.tune.searcher and self.cluster.executor == "local":
            raise ConfigError(
                "tune.searcher: searchers of Ray Tune need executor 'ray'; tpe, random and grid "
                "run without it"
            )
