"""A whole job of many candidates: what its driver takes of memory and time, stage by stage.

    python tests/benchmarks/driver_memory.py [--candidates 1000 100000] [--folder FOLDER]

A job from validation to MLflow: simulated annealing over the 20 groups of a chain of convolutions.
All is real but the evaluations of the search, which a host answers at once with numbers drawn from
the candidate, so that one process plays a search of days. Each job has a process of its own, and
then one that resumes it as if its driver had been killed at the search's end: without the trial's
own marker, so that the search is replayed from the ledger.

Columns: seconds of wall time until the end of the search, of what comes after it (recovery,
measurement, table of points, figures, report, MLflow), and of the resumed job; resident memory
before the search, after it, and at its peak, in MiB.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import raycompress
from raycompress.candidate import Shard
from raycompress.host import ModelHost
from raycompress.progress import SilentProgress
from raycompress.task import Progress
from raycompress.testing import ToyTask
from raycompress.units import Unit, UnitResult

NUM_GROUPS = 20
NEIGHBOURS = 4


class ChainTask(ToyTask):
    """Twenty convolutions."""

    def build_model(self) -> nn.Module:
        """The same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers: list[nn.Module] = [nn.Conv2d(2, 16, 3, padding=1)]
            for _ in range(NUM_GROUPS - 1):
                layers += [nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
            return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


EVALUATED = ModelHost.run


def instant(self: ModelHost, unit: Unit, progress: Progress | None = None) -> UnitResult:
    """A host that knows every answer of a search, drawn from what is asked; the rest is real."""
    candidate = unit.candidate
    if candidate.training is not None or not candidate.kept or not unit.shards:
        return EVALUATED(self, unit, progress)
    loss = random.Random(repr(candidate.kept)).random()
    sums = tuple(
        Shard(24, 24 * (1 - loss) + 0.01 * index, 24 * loss + 0.01 * index) for index in unit.shards
    )
    return UnitResult(sums, seconds=0.05, worker=self.name)


class Stages(SilentProgress):
    """When each stage began, and with how much memory."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.seen: dict[str, tuple[float, float]] = {}

    def stage(self, text: str) -> None:
        """Notes one."""
        self.seen[text.split()[0]] = (time.monotonic() - self.start, resident())


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def job(candidates: int, folder: str) -> None:
    """Runs one; prints its figures."""
    ModelHost.run = instant  # type: ignore[method-assign]
    stages = Stages()
    result = raycompress.run(
        {
            "name": "many",
            "task": "driver_memory:ChainTask",
            "output": folder,
            "pruners": [
                {
                    "type": "SimulatedAnnealing",
                    "iterations": candidates // NEIGHBOURS,
                    "neighbours": NEIGHBOURS,
                    "recalibrate": 0,
                    "reconstruct": False,
                }
            ],
            "budgets": [{"macs": "50%"}],
            "cluster": {"executor": "local"},
        },
        progress=stages,
    )
    figures = {
        "stages": stages.seen,
        "seconds": time.monotonic() - stages.start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "points": result.num_points,
        "winner": result.trials[0].counts,
        "replayed": result.trials[0].replayed,
    }
    print(json.dumps(figures))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--folder", help="for outputs, which take 250 MB")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if args.job is not None:
        job(int(args.job[0]), args.job[1])
        return
    names = ["proposals", "models judged", "search, s", "after it, s", "resumed, s"]
    names += ["before, MiB", "after the search, MiB", "peak, MiB", "peak when resumed, MiB"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for num in args.candidates:
            output = Path(folder) / str(num)
            command = [sys.executable, __file__, "--job", str(num), str(output)]
            runs = []
            for _ in range(2):
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                runs.append(json.loads(printed.splitlines()[-1]))
                for marker in output.glob("trials/*/result.json"):
                    marker.unlink()
            first, again = runs
            assert first["winner"] == again["winner"] and first["replayed"] < again["replayed"]
            (begin, before), (end, after) = (first["stages"][s] for s in ("Search:", "Measure"))
            seconds = [end - begin, first["seconds"] - end, again["seconds"]]
            memory = [before, after, first["peak"], again["peak"]]
            values = [num, first["points"], *(f"{v:.0f}" for v in (*seconds, *memory))]
            print(f"| {' | '.join(map(str, values))} |", flush=True)


if __name__ == "__main__":
    main()
