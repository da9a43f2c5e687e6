"""One trial: a pruner's search from start to finish, wherever it runs.

A trial's process gets plain data, builds what it needs, searches, and leaves `result.json` as its
own finished marker; a trial that has one isn't run again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from raycompress.budget import Budget
from raycompress.candidate import Candidate, Ranking, Training, Trial, digest_of
from raycompress.config import JobConfig
from raycompress.errors import EvaluationError
from raycompress.executor import LedgerExecutor
from raycompress.identity import sources_of, structure_digest
from raycompress.importing import resolve
from raycompress.ledger import Ledger
from raycompress.loading import build_pruner
from raycompress.plan import TrialPlan
from raycompress.points import Pricer, Recorder, points_path
from raycompress.pruning.pruner import Problem
from raycompress.search import run_search
from raycompress.storage import Place, local_copy, write_whole
from raycompress.structure import Cost, Structure
from raycompress.structure.latency.table import LatencyTable
from raycompress.task import Task
from raycompress.weights import Weights, WeightStore

__all__ = [
    "MakePool",
    "Report",
    "Shared",
    "finished",
    "load_ranking",
    "metrics_of",
    "point_of",
    "run_trial",
    "save_ranking",
    "save_result",
    "unfinished",
]

MakePool = Callable[[Ledger], LedgerExecutor]
"""Makes the trial's executor: model hosts for the job's task, with the dense weights."""
POINT = ("score", "loss", "best_score", "best_loss", "within_loss", "dfe", "failed")
"""What every point of a search's curve has, besides its step and the search's own figures."""
Report = Callable[[int, Mapping[str, float]], None]
"""Called with (step, metrics) after each step of the search."""


@dataclass(frozen=True)
class Shared:
    """What all trials of a job read; sent once.

    Attributes:
        config: The job.
        structure: Analysis of its model.
        digest: Of the dense weights.
        weights: The dense weights.
        output: Of the job.
        latency: Prices latency budgets; None: no budget asks for it.
        facts: What else results depend on, as the hosts know it: digests of the task and of its
            data, and the numeric class.
    """

    config: JobConfig
    structure: Structure
    digest: str
    weights: Weights
    output: Place
    latency: LatencyTable | None = None
    facts: tuple[str, ...] = ()

    def payload(self, trial: TrialPlan) -> dict[str, Any]:
        """What a trial's process needs, as plain data; its "key" is what the result depends on."""
        entry = {
            "name": trial.name,
            "pruner": dict(trial.entry),
            "budget": None if trial.budget_entry is None else dict(trial.budget_entry),
            "seed": trial.seed,
        }
        if trial.train is not None:
            entry["train"] = vars(trial.train)
        priced = {}
        if self.latency is not None and trial.budget is not None and trial.budget.names_latency:
            priced["latency"] = self.latency.digest
        targets = [vars(target) for target in self.config.targets]
        evaluation = vars(self.config.evaluation)
        key = digest_of(
            {
                "trial": entry,
                "weights": self.digest,
                "task": self.config.task,
                "args": repr(sorted(self.config.task_args.items())),
                "targets": targets,
                "structure": structure_digest(self.structure),
                "evaluation": evaluation,
                "facts": list(self.facts),
                "sources": sources_of(entry),
                **priced,
            }
        )
        return {**entry, "key": key}


def finished(shared: Shared, payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a trial that has finished, or None."""
    path = _folder(shared, payload) / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["key"] == payload["key"] else None


def run_trial(
    payload: Mapping[str, Any], make_pool: MakePool, report: Report, shared: Shared
) -> dict[str, Any]:
    """Runs a trial's search, answering from the ledger what was finished before.

    Args:
        payload: `shared.payload(trial)`.
        make_pool: Makes the executor.
        report: Told of each step.
        shared: The job.

    Returns:
        Plain data: the winner, its scores, and what the search cost.
    """
    before = finished(shared, payload)
    if before is not None:
        return before
    start = time.monotonic()
    config = shared.config
    task: Task = resolve(config.task, Task)(**config.task_args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = task.build_model().eval()
    model.load_state_dict(dict(shared.weights.state))
    name = str(payload["name"])
    curve: list[dict[str, Any]] = []
    replayed, spent = 0, 0.0
    charged: dict[Candidate, float] = {}
    figures: dict[str, float] = {}
    saved: set[str] = set()
    with Ledger(shared.output / "ledger", name) as ledger, make_pool(ledger) as pool:
        problem = Problem(
            model=model,
            structure=shared.structure,
            weights=shared.digest,
            executor=pool,
            store=WeightStore(shared.output / "weights"),
            budget=None if payload["budget"] is None else Budget.of(payload["budget"]),
            targets=config.targets,
            seed=int(payload["seed"]),
            latency=shared.latency,
            report=figures.update,
        )
        pruner = build_pruner(payload["pruner"], "pruner")
        pricer = Pricer(pool, shared.digest, model, shared.latency)
        points = Recorder(points_path(shared.output, name), pricer, name)

        def on_step(_: int, trials: Sequence[Trial]) -> None:
            nonlocal replayed, spent
            for digest, ranking in pool.rankings.items():
                if digest not in saved:
                    save_ranking(ranking, shared.output / "rankings")
                    saved.add(digest)
            points.add(len(curve), trials)
            for trial in trials:  # what is asked for again was paid for before
                replayed += trial.replayed and trial.candidate not in charged
                paid = charged.get(trial.candidate, 0.0)
                charged[trial.candidate] = max(trial.dfe, paid)
                spent += charged[trial.candidate] - paid
            # Statistics, probes and looks at the dense model cost, and are no steps of the search.
            own = [t for t in trials if not t.probe and not t.candidate.is_plain]
            alive = [trial for trial in own if trial.judged]
            if alive:
                best = min(alive, key=lambda trial: trial.loss)
                score, loss = best.score, best.loss
            elif curve and own:  # the incumbent beat them all, or they failed
                score, loss = curve[-1]["best_score"], curve[-1]["best_loss"]
            else:
                return
            step = len(curve)
            curve.append(
                {
                    "step": step,
                    "score": score,
                    "loss": loss,
                    "best_score": max([score, *(c["best_score"] for c in curve[-1:])]),
                    "best_loss": min([loss, *(c["best_loss"] for c in curve[-1:])]),
                    "within_loss": min(
                        [t.loss for t in alive if _within(problem, pricer, t)]
                        + [c["within_loss"] for c in curve[-1:]],
                        default=math.inf,
                    ),
                    "dfe": spent,
                    "failed": sum(trial.failure is not None for trial in own),
                    "figures": dict(figures),
                }
            )
            figures.clear()
            report(step, metrics_of(curve[-1]))

        winner = run_search(pruner.search(problem), pool, on_step)
        judged = _judged(pool, winner)
        if curve:
            spent += judged.dfe
            points.add(len(curve) - 1, [judged])
        else:  # it asked for nothing: its answer is its only step
            on_step(0, [judged])
        winner = _as_trained(winner, judged)
        if "train" in payload:
            training = Training(**payload["train"], seed=problem.seed)
            # As in the job: trained in float, then it has the bits that were found.
            judged = _judged(pool, replace(winner, quantize=None, training=training))
            winner = replace(winner.trained(judged.trained()), quantize=winner.quantize)
            if winner.quantize is not None:
                spent += judged.dfe
                points.add(len(curve), [judged])
                judged = _judged(pool, winner)
            on_step(len(curve), [judged])
        point = pricer.point(judged)
        assert point is not None  # it was judged
        result = {
            "key": payload["key"],
            "name": name,
            "winner": winner.key(),
            "score": judged.score,
            "loss": judged.loss,
            "macs": point.macs,
            "params": point.params,
            "failure": None,
            "stopped": None,
            "total_dfe": spent,
            "evaluated": pool.num_evaluated,
            "replayed": replayed,
            "seconds": round(time.monotonic() - start, 3),
            "curve": curve,
        }
    save_result(shared, payload, result)
    return result


def save_result(shared: Shared, payload: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Leaves a trial's finished marker, after which it isn't run again."""
    write_json(_folder(shared, payload) / "result.json", result)


def _judged(pool: LedgerExecutor, winner: Candidate) -> Trial:
    judged = pool.evaluate([winner])[0]
    if judged.failure is not None:
        raise EvaluationError(f"its winner failed: {judged.failure}")
    return judged


def _as_trained(winner: Candidate, judged: Trial) -> Candidate:
    """What was trained is the winner, not the training."""
    return winner if judged.weights is None else winner.trained(judged.weights)


def _within(problem: Problem, pricer: Pricer, trial: Trial) -> bool:
    """Whether a candidate is within the budget, not on its way to it."""
    if problem.budget is None:
        return True
    point, latency = pricer.point(trial), None
    if point is None:
        return False
    if problem.latency is not None and point.latency_ms is not None:
        latency = (point.latency_ms, problem.latency.latency_ms())
    cost = Cost(point.params, point.macs, 0)
    return problem.budget.excess(cost, problem.structure.cost(), latency) <= 1


def unfinished(
    payload: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    *,
    failure: str | None = None,
    stopped: int | None = None,
) -> dict[str, Any]:
    """The result of a trial that failed, or was stopped at a step: as far as it came."""
    last = curve[-1] if curve else {}
    return {
        "key": payload["key"],
        "name": payload["name"],
        "winner": None,
        "score": last.get("best_score"),
        "loss": last.get("best_loss"),
        "failure": failure,
        "stopped": stopped,
        "total_dfe": last.get("dfe", 0.0),
        "evaluated": 0,
        "replayed": 0,
        "seconds": 0.0,
        "curve": [dict(point) for point in curve],
    }


def point_of(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The inverse of `metrics_of`."""
    known = {name: metrics[name] for name in POINT}
    return {
        "step": step,
        **known,
        "failed": int(metrics["failed"]),
        "figures": {name: value for name, value in metrics.items() if name not in POINT},
    }


def metrics_of(point: Mapping[str, Any]) -> dict[str, float]:
    """A point of a search's curve as flat metrics."""
    plain = {k: v for k, v in point.items() if k not in ("step", "figures")}
    return {**plain, **point["figures"]}


def write_json(path: Place, value: object) -> None:
    """Writes JSON so that the file appears whole or not at all."""
    write_whole(path, json.dumps(value, indent=1).encode())


def save_ranking(ranking: Ranking, folder: Place) -> None:
    """Writes a ranking as `<digest>.safetensors`."""
    path = folder / f"{ranking.digest}.safetensors"
    if not path.exists():
        write_whole(path, save(dict(ranking.orders), {"kind": ranking.kind}))


def load_ranking(digest: str, folder: Place) -> Ranking:
    """Reads what `save_ranking` wrote."""
    with local_copy(folder / f"{digest}.safetensors") as path, safe_open(path, "pt") as file:
        orders = {name: file.get_tensor(name) for name in file.keys()}
        kind = (file.metadata() or {})["kind"]
    assert kind in ("channels", "weights")
    return Ranking(kind, orders)


def _folder(shared: Shared, payload: Mapping[str, Any]) -> Place:
    return shared.output / "trials" / str(payload["name"])
