"""The generator protocol of searches, and who answers it.

A search is a generator: `trials = yield candidates`, ending with `return winner`. It knows nothing
of processes: an *executor* answers. Proposals come from RNG(seed, iteration), and how many there
are at a step is configuration, never the number of workers; so every executor leads a search along
the same path.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import scipy  # its parts load when they are used first: replicas need none

from raycompress.candidate import Candidate, Ranking, Trial
from raycompress.errors import EvaluationError
from raycompress.task import Split

__all__ = ["Asked", "Executor", "Probes", "Race", "Search", "Timings", "answer", "run_search"]


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
    return mean > float(scipy.special.stdtrit(num - 1, confidence)) * error and mean > 0


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


@dataclass(frozen=True)
class Timings:
    """Quantized candidates that a search yields to learn how fast they are on a runtime.

    They are lowered and timed in turns on one host. None is judged: trials say `latency_ms`, and
    `float_ms` where that is asked for.

    Attributes:
        candidates: In the order of the answer; few, since all are in memory at once.
        runtime: A backend that computes in integers, such as "onnx".
        batch_size: Examples in a forward pass.
        floats: Indices of those of which the float model is timed as well.
    """

    candidates: tuple[Candidate, ...]
    runtime: str
    batch_size: int = 1
    floats: tuple[int, ...] = (0,)


Asked = Sequence[Candidate] | Probes | Race | Timings
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

    def timed(self, asked: Timings) -> list[Trial]:
        """Times candidates on a runtime; answers likewise."""


def answer(asked: Asked, executor: Executor) -> list[Trial]:
    """Answers one step of a search."""
    if isinstance(asked, Race):
        return asked.run(executor)
    if isinstance(asked, Probes):
        return [replace(trial, probe=True) for trial in executor.evaluate(asked.candidates)]
    if isinstance(asked, Timings):
        return [replace(trial, probe=True) for trial in executor.timed(asked)]
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
