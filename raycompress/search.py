"""Candidates, the generator protocol of searches, and who answers it.

A search is a generator: `trials = yield candidates`, ending with `return winner`. It knows nothing
of processes: an *executor* answers. Proposals come from RNG(seed, iteration), and how many there
are at a step is configuration, never the number of workers; so every executor leads a search along
the same path.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from scipy.stats import t as student_t
from torch import Tensor

from raycompress.collect import Collector
from raycompress.errors import EvaluationError
from raycompress.method import TrainingMethod
from raycompress.plain import from_plain, to_plain
from raycompress.quantization.quantizer import Quantization
from raycompress.reconstruction import Reconstruction
from raycompress.task import Split

__all__ = [
    "Asked",
    "Candidate",
    "Executor",
    "Probes",
    "Race",
    "Ranking",
    "Search",
    "Shard",
    "Training",
    "Trial",
    "answer",
    "digest_of",
    "run_search",
]


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as 16 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


@dataclass(frozen=True)
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
            (name, int(count))
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
        probe: It was asked for as one of `Probes`.
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


@dataclass(frozen=True)
class Race:
    """Candidates that a search yields to learn which are good, not how bad the others are.

    All are judged on a few shards, then on twice as many, and so on. After each round those go that
    are worse than their incumbent by more than their margin, by a one-sided paired t-test over the
    shards (the same examples, so what is hard for both cancels out).

    Attributes:
        candidates: In the order of the answer. None has training.
        incumbents: For each candidate, judged on all shards; empty: the best of the race so far.
        margins: For each candidate, by how much it may be worse, in the objective's unit; empty: 0.
        objective: "loss" or "score": what is compared.
        confidence: With which a candidate must be worse to go, in (0.5, 1).
    """

    candidates: tuple[Candidate, ...]
    incumbents: tuple[Trial, ...] = ()
    margins: tuple[float, ...] = ()
    objective: Literal["loss", "score"] = "loss"
    confidence: float = 0.975

    def run(self, executor: Executor) -> list[Trial]:
        """Races; one trial for each candidate, in their order."""
        trials = [Trial(candidate) for candidate in self.candidates]
        done = 0
        for end in rungs(executor.num_shards):
            alive = [i for i, trial in enumerate(trials) if trial.judged]
            if end == executor.num_shards and done == 0:  # too few shards to race on
                asked = [self.candidates[i] for i in alive]
            else:
                asked = [replace(self.candidates[i], shards=(done, end)) for i in alive]
            for i, answer in zip(alive, executor.evaluate(asked) if asked else [], strict=True):
                trials[i] = _joined(trials[i], answer, first=done == 0)
            done = end
            if done < executor.num_shards:
                trials = [
                    replace(t, dropped=t.dropped or (t.judged and self._hopeless(i, trials)))
                    for i, t in enumerate(trials)
                ]
        return trials

    def _hopeless(self, index: int, trials: Sequence[Trial]) -> bool:
        mine = self._energies(trials[index])
        if self.incumbents:
            rival = self._energies(self.incumbents[index])[: len(mine)]
        else:
            rivals = [self._energies(trial) for trial in trials if trial.judged]
            rival = min(rivals, key=sum)
        margin = self.margins[index] if self.margins else 0.0
        return worse(mine, rival, margin, self.confidence)

    def _energies(self, trial: Trial) -> list[float]:
        """Mean loss, or mean score with its sign changed, of each shard."""
        if self.objective == "loss":
            return [shard.loss / shard.count for shard in trial.shards]
        return [-shard.score / shard.count for shard in trial.shards]


def rungs(num_shards: int) -> list[int]:
    """How many shards have been looked at after each round: an eighth, at least 2, then doubled."""
    ends = [min(max(num_shards // 8, 2), num_shards)]
    while ends[-1] < num_shards:
        ends.append(min(2 * ends[-1], num_shards))
    return ends


def worse(mine: Sequence[float], rival: Sequence[float], margin: float, confidence: float) -> bool:
    """Whether the mean of `mine` exceeds that of `rival` by more than the margin.

    A one-sided paired t-test; with two equal differences there is no doubt.

    Args:
        mine: Energies of at least two shards.
        rival: Of the same shards.
        margin: Above 0 makes it harder to be worse.
        confidence: In (0.5, 1).
    """
    differences = [a - b - margin for a, b in zip(mine, rival, strict=True)]
    mean, num = statistics.fmean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(num)
    return mean > float(student_t.ppf(confidence, num - 1)) * error and mean > 0


def _joined(before: Trial, answer: Trial, *, first: bool) -> Trial:
    """A candidate's trial with one more round in it."""
    return replace(
        before,
        shards=(*before.shards, *answer.shards),
        failure=answer.failure,
        seconds=before.seconds + answer.seconds,
        dfe=before.dfe + answer.dfe,
        replayed=answer.replayed and (first or before.replayed),
    )


@dataclass(frozen=True)
class Probes:
    """Candidates that a search yields to learn from, none of which is an answer.

    Attributes:
        candidates: In the order of the answer.
    """

    candidates: tuple[Candidate, ...]


Asked = Sequence[Candidate] | Probes | Race
"""What a search yields."""

Search = Generator[Asked, list[Trial], Candidate]
"""What a pruner's `search` returns."""


class Executor(Protocol):
    """Who answers a search: `LocalExecutor` in process, `ReplicaPool` on Ray."""

    @property
    def num_shards(self) -> int:
        """Parts of the validation split that a race may look at one after the other."""

    def publish(self, ranking: Ranking) -> None:
        """Makes a ranking known, before a candidate uses it."""

    def evaluate(self, candidates: Sequence[Candidate], split: Split = "validation") -> list[Trial]:
        """Judges candidates; answers in their order. A failed one is an answer, not an error."""


def answer(asked: Asked, executor: Executor) -> list[Trial]:
    """Answers one step of a search."""
    if isinstance(asked, Race):
        return asked.run(executor)
    if isinstance(asked, Probes):
        return [replace(trial, probe=True) for trial in executor.evaluate(asked.candidates)]
    return executor.evaluate(asked)


def run_search(
    search: Search,
    executor: Executor,
    on_step: Callable[[int, Sequence[Trial]], None] | None = None,
) -> Candidate:
    """Drives a search to its winner.

    Candidates that fail are answers: the search goes on with what is left, also past a step in
    which none is, if it can. It ends where nothing pruned, quantized or trained has come through
    so far.

    Args:
        search: A fresh generator.
        executor: Answers it.
        on_step: Called after each step with its number (from 0) and its trials.

    Raises:
        EvaluationError: Every candidate of a step failed, and none was alive before; the reasons
            are in it.
    """
    step, alive = 0, False
    try:
        candidates = next(search)
        while True:
            trials = answer(candidates, executor)
            alive = alive or any(
                not trial.candidate.is_plain and not trial.probe and trial.failure is None
                for trial in trials
            )
            if trials and not alive and all(trial.failure is not None for trial in trials):
                reasons = sorted({str(trial.failure) for trial in trials})
                raise EvaluationError(
                    f"all {len(trials)} candidates of step {step} failed: {'; '.join(reasons[:3])}"
                )
            if on_step is not None:
                on_step(step, trials)
            step += 1
            candidates = search.send(trials)
    except StopIteration as stop:
        winner: Candidate = stop.value
        return winner
