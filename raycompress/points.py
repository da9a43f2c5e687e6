"""From a search's trials to the job's table of everything that was evaluated.

A trial writes its points as it goes (`trials/<name>/points.jsonl`), so that those of a trial that
fails or is stopped are there too; the job puts them together in `results/pareto.parquet`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from torch import nn

from raycompress.budget import Pricing
from raycompress.candidate import Candidate, Trial, id_of
from raycompress.executor import LedgerExecutor
from raycompress.identity import structure_digest
from raycompress.pareto import RESOURCES, Point, marked
from raycompress.plan import Plan
from raycompress.pruning.bit_costs import BitCosts
from raycompress.quantization import Bits, Quantization
from raycompress.results import TrialResult
from raycompress.storage import ObjectPath, Place, Segments, read_all, write_whole

__all__ = [
    "Pricer",
    "Recorder",
    "gather",
    "origin_of",
    "points_path",
    "read_points",
    "read_table",
    "write_table",
]


def points_path(output: Place, trial: str) -> Place:
    """Where a trial writes what it evaluated."""
    return output / "trials" / trial / "points.jsonl"


@dataclass(frozen=True)
class Pricer:
    """Makes points.

    Attributes:
        executor: Knows rankings, and what weights have lost.
        dense: Digest of the dense weights.
        model: Dense.
        latency: Predicts; None: nothing was measured.
    """

    executor: LedgerExecutor
    dense: str
    model: nn.Module
    latency: Pricing | None = None

    def point(
        self,
        trial: Trial,
        name: str = "",
        step: int | None = None,
        stage: Literal["dense", "search", "final"] = "search",
    ) -> Point | None:
        """A judged candidate's point; None for what has no score, such as statistics."""
        asked = trial.candidate
        if trial.failure is not None or not trial.shards:
            return None
        candidate = replace(asked, shards=None, training=None)
        if asked.training is not None:
            # What came out of the training was judged.
            candidate = candidate.trained(trial.trained())
        key, how = candidate.key(), candidate.quantize
        counts = self.executor.counts(candidate)
        cost = self.executor.structure.cost(counts)
        num = sum(shard.count for shard in trial.shards)
        training, info = asked.training, self.executor.info
        seen_all = info.whole or num == info.num_examples["validation"]
        return Point(
            id=id_of(key),
            trial=name,
            step=step,
            stage=stage,
            candidate=json.dumps(key, sort_keys=True),
            macs=cost.macs,
            params=cost.params - self._masked(candidate),
            latency_ms=None
            if self.latency is None or how is not None
            else self.latency.latency_ms(counts),
            size_bytes=self._size(how, counts),
            bits="" if how is None else how.words(),
            score=sum(shard.score for shard in trial.shards) / num,
            loss=sum(shard.loss for shard in trial.shards) / num,
            complete=trial.judged and seen_all,
            trained=asked.weights != self.dense
            or (training is not None and bool(training.epochs or training.steps)),
            reconstructed=asked.reconstruct is not None,
        )

    def judge(self, candidate: Candidate) -> Trial:
        """Looks at a candidate on validation data; the ledger answers what was judged before."""
        return self.executor.evaluate([candidate])[0]

    def _size(self, how: Quantization | None, counts: Mapping[str, int]) -> int:
        """Bytes that are stored; of layers that share their weight, in float."""
        structure = self.executor.structure
        if how is None:
            buffers = sum(buffer.nbytes for buffer in self.model.buffers())
            return 4 * structure.cost(counts).params + buffers
        costs, chosen = BitCosts.of(self.model, structure, counts), dict(how.choices)
        bits = {name: chosen.get(name, Bits()) for name in costs.layers}
        return costs.size({name: (each.weight or 32, each.input) for name, each in bits.items()})

    def _masked(self, candidate: Candidate) -> int:
        """Single weights that are masked."""
        ranking = self.executor.rankings.get(candidate.ranking)
        if ranking is None or ranking.kind != "weights":
            return 0
        return sum(ranking.orders[name].numel() - count for name, count in candidate.kept)


class Recorder:
    """Writes a trial's points, each model once, at the step that first saw it.

    Args:
        path: Of the file, written anew: a search that starts again replays its steps.
        pricer: Makes points.
        name: Of the trial.
    """

    def __init__(self, path: Place, pricer: Pricer, name: str) -> None:
        if isinstance(path, ObjectPath):
            for segment in Segments.of(path):
                segment.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        self._path, self._pricer, self._name = path, pricer, name
        self._seen: dict[str, int] = {}

    def add(self, step: int, trials: Sequence[Trial]) -> None:
        """Writes the points of a step; looks at the dense model are none of the search's."""
        lines = []
        for trial in trials:
            asked = trial.candidate
            if asked.weights == self._pricer.dense and asked.is_plain:
                continue
            point = self._pricer.point(trial, self._name, step)
            # What a race dropped may be judged in full later.
            if point is None or self._seen.get(point.id, -1) >= point.complete:
                continue
            self._seen[point.id] = int(point.complete)
            lines.append(json.dumps(asdict(point)) + "\n")
        if not lines:
            return
        if isinstance(self._path, ObjectPath):
            segment = Segments(self._path)
            segment.write("".join(lines).encode())
            segment.commit()
            return
        with self._path.open("a") as file:
            file.write("".join(lines))


def read_points(path: Place) -> list[Point]:
    """What a `Recorder` wrote; nothing if there is no file."""
    if isinstance(path, ObjectPath):
        text = b"".join(read_all(Segments.of(path))).decode()
    else:
        text = path.read_text() if path.exists() else ""
    found: dict[str, Point] = {}
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # else a process was killed as it wrote
            point = _point(json.loads(line))
            found[point.id] = point
    return list(found.values())


def gather(
    plan: Plan,
    trials: Sequence[TrialResult],
    winners: Mapping[str, Candidate],
    pricer: Pricer,
    others: Sequence[str] = (),
) -> list[Point]:
    """The points of a job, marked: dense, what each trial's search judged, and its final models.

    Args:
        plan: The job.
        trials: Finished, or as far as they came.
        winners: What the search of each finished trial returned, by trial.
        pricer: With rankings of the winners.
        others: Names of trials that were searched alone, as samples of a study that weren't kept.
    """
    found = [pricer.point(pricer.judge(Candidate(pricer.dense)), stage="dense")]
    for name in others:
        found += read_points(points_path(plan.output, name))
    for trial in trials:
        found += read_points(points_path(plan.output, trial.name))
        if not trial.rows:
            continue
        winner = winners.get(trial.name, Candidate(pricer.dense))  # else it is the dense model
        model = winner.trained(trial.weights)
        trained = plan.config.recover is not None or winner.weights != pricer.dense
        finals = [(pricer.judge(model), trained)] if trial.pruner else []
        if plan.quantize is not None and trial.quantized is not None:
            judged = pricer.judge(model.trained(trial.quantized.weights))
            how = plan.quantize.with_bits(winner.quantize)
            trained = trained or plan.quantize.section.training is not None
            finals.append((replace(judged, candidate=replace(model, quantize=how)), trained))
        imitated = plan.config.reconstruct and bool(winner.kept)
        imitated = imitated or winner.reconstruct is not None
        for judged, trained in finals:
            final = pricer.point(judged, trial.name, stage="final")
            if final is not None:
                found.append(replace(final, trained=trained, reconstructed=imitated))
    return marked([point for point in found if point is not None])


def _point(values: Mapping[str, Any]) -> Point:
    lists = {name: tuple(values[name]) for name in ("fronts", "search_fronts")}
    return Point(**{**values, **lists})


def origin_of(executor: LedgerExecutor, dense: str) -> dict[str, str]:
    """What a job's points mean something for: its task, data, structure and dense weights."""
    info = executor.info
    return {
        "task": info.task,
        "data": info.data,
        "structure": structure_digest(executor.structure),
        "weights": dense,
    }


FLAGS = {"fronts": "on_front", "search_fronts": "on_search_front"}


def write_table(points: Sequence[Point], path: Place, origin: Mapping[str, str]) -> None:
    """Writes points as Parquet.

    Args:
        points: Marked.
        path: Of the file.
        origin: What the points mean something for, such as the task's digest; kept as metadata.
    """
    rows = []
    for point in points:
        row = asdict(point)
        kept = dict(json.loads(point.candidate)["kept"])
        row["kept"] = json.dumps(kept)
        for name, flag in FLAGS.items():
            marks = row.pop(name)
            row |= {f"{flag}_{_short(r)}": r in marks for r in RESOURCES}
        rows.append(row)
    types = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    columns = {"step": int, "macs": int, "params": int, "latency_ms": float, "size_bytes": int}
    columns |= {"score": float, "loss": float}
    columns |= dict.fromkeys(("complete", "trained", "reconstructed"), bool)
    columns |= {f"{flag}_{_short(r)}": bool for flag in FLAGS.values() for r in RESOURCES}
    names = [f.name for f in fields(Point) if f.name not in FLAGS]
    names = [*names, "kept", *(n for n in columns if n.startswith("on_"))]
    schema = pyarrow.schema(
        [(n, types[columns[n]] if n in columns else pyarrow.string()) for n in names],
        metadata={"raycompress": json.dumps(dict(origin))},
    )
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), buffer)
    write_whole(path, buffer.getvalue().to_pybytes())


def read_table(path: Place) -> tuple[list[Point], dict[str, str]]:
    """The points and the origin that `write_table` was given."""
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(path.read_bytes()))
    origin: dict[str, str] = json.loads(table.schema.metadata[b"raycompress"])
    points = []
    for row in table.to_pylist():
        marks = {
            # What an older version wrote lacks some.
            name: tuple(r for r in RESOURCES if row.pop(f"{flag}_{_short(r)}", False))
            for name, flag in FLAGS.items()
        }
        row.pop("kept")
        points.append(_point({**row, **marks}))
    return points, origin


def _short(resource: str) -> str:
    return resource.removesuffix("_ms").removesuffix("_bytes")
