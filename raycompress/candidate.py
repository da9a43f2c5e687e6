"""Candidates: what a search asks about, and what it is answered. Plain data."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from raycompress.collect import Collector
from raycompress.errors import EvaluationError
from raycompress.method import TrainingMethod
from raycompress.plain import from_plain, to_plain
from raycompress.quantization.quantizer import Quantization
from raycompress.reconstruction import Reconstruction

__all__ = ["Candidate", "Ranking", "Shard", "Training", "Trial", "digest_of", "id_of"]


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as 16 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=1 << 16)
def _pair(name: str, count: int) -> tuple[str, int]:
    """One object for all candidates that hold it: they are most of what many of these take."""
    return name, count


def id_of(key: Mapping[str, Any]) -> str:
    """Of a candidate with this key, for people: in the table of points and in messages."""
    return digest_of(key)[:10]


@dataclass(frozen=True)
class Ranking:
    """The order in which units go, computed once and sent once.

    Attributes:
        kind: "channels": keys are channel groups, candidates are slimmed; "weights": keys are
            parameter names, units are their single entries, candidates are masked.
        orders: For each key, an int64 permutation: the first index goes first.
        digest: Content address, in every candidate that uses it.
    """

    kind: Literal["channels", "weights"]
    orders: Mapping[str, Tensor]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256(self.kind.encode())
        for name in sorted(self.orders):
            content.update(name.encode())
            content.update(self.orders[name].contiguous().to(torch.int64).numpy().tobytes())
        object.__setattr__(self, "digest", content.hexdigest()[:16])

    def kept(self, counts: Mapping[str, int]) -> dict[str, Tensor]:
        """The kept unit indices, ascending, for kept counts."""
        return {
            name: self.orders[name][len(self.orders[name]) - count :].sort().values
            for name, count in counts.items()
        }


@dataclass(frozen=True)
class Training:
    """A training unit: how a candidate is trained before it is evaluated.

    Attributes:
        epochs: Passes over the train split; may be a fraction. 0 (without steps) trains nothing:
            the candidate is built, recalibrated and stored.
        lr: Peak learning rate; None takes the task's own.
        seed: Of the order of examples.
        methods: What happens around the optimizer's steps, outermost first.
        steps: Optimizer steps, in place of epochs; 0: epochs decide.
    """

    epochs: float
    lr: float | None = None
    seed: int = 0
    methods: tuple[TrainingMethod, ...] = ()
    steps: int = 0

    def in_epochs(self, steps_per_epoch: int) -> float:
        """Passes over the train split."""
        return self.steps / steps_per_epoch if self.steps else self.epochs


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model to judge: small, plain data, never weights.

    Attributes:
        weights: Digest of the parent's weights in the weight store.
        kept: (group or parameter name, kept count), sorted by name; what is absent stays whole.
        ranking: Digest of the `Ranking` that says which units stay; "" for the dense model.
        recalibrate: Calibration batches from which norm statistics are taken anew before judging;
            0: they stay.
        training: What is trained first; None: nothing.
        collect: What is collected of the weights over calibration data, in place of a judgement:
            the trial's `weights` is then the digest of the statistics. None: nothing.
        reconstruct: Layers that lost inputs or weights imitate the dense ones first, by least
            squares; None: they stay as they are.
        quantize: How it is quantized, after all of that and before any training: what is trained
            and judged computes with quantized numbers. None: as its weights are.
        shards: First and last but one of the validation shards that it is judged on, for races;
            None: all.
    """

    weights: str
    kept: tuple[tuple[str, int], ...] = ()
    ranking: str = ""
    recalibrate: int = 0
    training: Training | None = None
    collect: Collector | None = None
    reconstruct: Reconstruction | None = None
    quantize: Quantization | None = None
    shards: tuple[int, int] | None = None

    @staticmethod
    def of(
        counts: Mapping[str, int],
        ranking: Ranking,
        *,
        weights: str,
        recalibrate: int = 0,
        training: Training | None = None,
    ) -> Candidate:
        """A candidate from kept counts; counts that remove nothing are left out."""
        kept = tuple(
            _pair(name, int(count))
            for name, count in sorted(counts.items())
            if count < len(ranking.orders[name])
        )
        return Candidate(weights, kept, ranking.digest if kept else "", recalibrate, training)

    @property
    def counts(self) -> dict[str, int]:
        """`kept` as a dict."""
        return dict(self.kept)

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but its weights as they are: not pruned, quantized or trained."""
        return not self.kept and self.quantize is None and self.training is None

    def key(self) -> dict[str, Any]:
        """Plain data for the ledger's key."""
        training = self.training
        return {
            "weights": self.weights,
            "kept": [list(pair) for pair in self.kept],
            "ranking": self.ranking,
            "recalibrate": self.recalibrate,
            "training": None
            if training is None
            else {**vars(training), "methods": [to_plain(m) for m in training.methods]},
            "collect": None if self.collect is None else to_plain(self.collect),
            "reconstruct": None if self.reconstruct is None else dict(vars(self.reconstruct)),
            # Only where they are set: keys of older ledgers stay.
            **({} if self.quantize is None else {"quantize": self.quantize.key()}),
            **({} if self.shards is None else {"shards": list(self.shards)}),
        }

    @staticmethod
    def from_key(key: Mapping[str, Any]) -> Candidate:
        """The inverse of `key`, also after a trip through JSON."""
        training = key["training"]
        if training is not None:
            methods = tuple(from_plain(each, TrainingMethod) for each in training["methods"])
            training = Training(**{**training, "methods": methods})
        collect = key["collect"]
        return Candidate(
            weights=key["weights"],
            kept=tuple((str(name), int(count)) for name, count in key["kept"]),
            ranking=key["ranking"],
            recalibrate=key["recalibrate"],
            training=training,
            collect=None if collect is None else from_plain(collect, Collector),
            reconstruct=None
            if key["reconstruct"] is None
            else Reconstruction(**key["reconstruct"]),
            quantize=Quantization.from_key(key["quantize"]) if "quantize" in key else None,
            shards=tuple(key["shards"]) if "shards" in key else None,
        )

    def with_training(self, training: Training | None) -> Candidate:
        """The same candidate, trained."""
        return replace(self, training=training)

    def trained(self, weights: str) -> Candidate:
        """What training left behind: these weights as they are, in the same shapes."""
        return replace(
            self, weights=weights, training=None, recalibrate=0, reconstruct=None, quantize=None
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """Sums over one validation shard.

    Attributes:
        count: Examples in it.
        score: Sum of their scores.
        loss: Sum of their losses (mean loss of a batch times its size).
    """

    count: int
    score: float
    loss: float


@dataclass(frozen=True, slots=True)
class Trial:
    """The answer to a candidate.

    Attributes:
        candidate: What was judged.
        shards: Sums for each shard in index order; empty for a failed candidate.
        failure: Why it failed; None if it didn't.
        weights: Digest of the weights that training it produced, or of what was collected; else
            None.
        seconds: Time on the worker.
        dfe: Cost in dense-forward equivalents.
        replayed: The ledger answered; nothing was evaluated.
        dropped: It lost a race before all shards were looked at; `shards` are those that were.
        probe: It was asked for as one of `Probes` or `Timings`.
        latency_ms: Milliseconds of a forward pass on the runtime that was asked for; None: it
            wasn't timed.
        float_ms: Likewise of the float model that it was made of, where that was timed.
    """

    candidate: Candidate
    shards: tuple[Shard, ...] = ()
    failure: str | None = None
    weights: str | None = None
    seconds: float = 0.0
    dfe: float = 0.0
    replayed: bool = False
    dropped: bool = False
    probe: bool = False
    latency_ms: float | None = None
    float_ms: float | None = None

    @property
    def judged(self) -> bool:
        """Whether it was looked at on all shards, without failing."""
        return self.failure is None and not self.dropped

    @property
    def score(self) -> float:
        """Mean score, higher is better; -inf for a candidate that failed or was dropped."""
        if not self.judged or not self.shards:
            return -math.inf
        return sum(s.score for s in self.shards) / sum(s.count for s in self.shards)

    @property
    def loss(self) -> float:
        """Mean loss, lower is better; inf for a candidate that failed or was dropped."""
        if not self.judged or not self.shards:
            return math.inf
        return sum(s.loss for s in self.shards) / sum(s.count for s in self.shards)

    def trained(self) -> str:
        """Digest of the weights that training produced.

        Raises:
            EvaluationError: Training failed; a search whose next step needs them ends here.
        """
        if self.weights is None:
            raise EvaluationError(f"training failed: {self.failure}")
        return self.weights
