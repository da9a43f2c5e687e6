"""Searches of allocations on Fashion-MNIST against controls, in one command that goes on.

    python tests/benchmarks/automatic.py OUTPUT [--full] [--quick] [--processes N]

Images pooled to 14x14, 24,000 for training; a VGG-like and a residual net, three seeds each;
budgets of 50, 30 and 15 % of the multiply-adds. With --full also the residual net at 28x28 with
49,000 images, one seed, at 30 %. "before" is the test accuracy of what a search ends with; "after"
that of the same after equal fine-tuning (3 epochs). Norm statistics are taken anew on calibration
data where a search ends without having done so. Searches see the validation and calibration splits
alone (those that train, the training split too); the test split is scored twice for each row, and
selects nothing. DFE counts the search, trainings included, and not the fine-tuning; seconds are
those of its units on one core. What `CurveSolver` probes once for all budgets is in each of its
rows, and once in the sums.

Each net and seed is a process; finished rows and finished units of work are kept in OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.tasks.fashion import Fashion
from raycompress.budget import Budget
from raycompress.candidate import Candidate, Training, Trial
from raycompress.ledger import Ledger
from raycompress.local import LocalExecutor
from raycompress.pruning import (
    AutoCompress,
    CurveSolver,
    NetAdapt,
    NNISimulatedAnnealing,
    OneShot,
    Problem,
    Pruner,
    RandomFilter,
    SimulatedAnnealing,
)
from raycompress.reconstruction import Reconstruction
from raycompress.search import run_search
from raycompress.structure import analyze
from raycompress.units import Evaluation
from raycompress.weights import Weights, WeightStore

BUDGETS = ("50%", "30%", "15%")
FULL_SIZE_BUDGETS = ("30%",)  # a forward pass at 28x28 costs four at 14x14
EVALUATION = Evaluation(batch_size=250, num_shards=16)
DENSE, RECOVER = Training(8.0, None, 0), Training(3.0, 0.03, 0)


def pruners(quick: bool) -> dict[str, tuple[Pruner, str]]:
    """By the name of their rows: the pruner, and what is done to its result."""
    few = 1 if quick else 0
    return {
        "random channels": (RandomFilter(), "recalibrate"),
        "uniform L1": (OneShot(criterion="l1"), "recalibrate"),
        "uniform L1 + least squares": (OneShot(criterion="l1"), "reconstruct"),
        "annealing as in NNI": (NNISimulatedAnnealing(), "recalibrate"),
        "annealing, not reconstructed": (
            SimulatedAnnealing(iterations=few or 20, reconstruct=False),
            "",
        ),
        "annealing": (SimulatedAnnealing(iterations=few or 20), ""),
        "NetAdapt": (NetAdapt(iterations=few or 10), ""),
        "AutoCompress": (AutoCompress(iterations=few or 10, rounds=few or 3), ""),
        "CurveSolver, not refined": (CurveSolver(iterations=0), ""),
        "CurveSolver": (CurveSolver(iterations=few or 4), ""),
    }


@dataclass(frozen=True)
class Row:
    """One search at one budget of one net and seed."""

    method: str
    budget: str
    before: float
    after: float
    dense: float
    macs: float
    dfe: float
    seconds: float
    shared: float = 0.0


def run(net: str, seed: int, size: int, output: Path, quick: bool) -> None:
    """All searches of one net and seed; rows that are there aren't made again."""
    torch.set_num_threads(1)
    folder = output / f"{net}-{size}-seed{seed}"
    num_train = 512 if quick else 24_000 if size == 14 else 49_000
    task = Fashion(size=size, num_train=num_train, model=net)
    torch.manual_seed(seed)
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs(), form="module")
    store = WeightStore(folder / "weights")
    with Ledger(folder / "ledger", "rows") as ledger:
        executor = LocalExecutor(task, structure, store, EVALUATION, ledger=ledger)
        initial = store.put(Weights(model.state_dict(), {}))
        training = replace(DENSE, seed=seed, epochs=1.0 if quick else DENSE.epochs)
        digest = executor.evaluate([Candidate(initial, training=training)])[0].trained()
        model.load_state_dict(dict(store.get(digest).state))
        dense = executor.evaluate([Candidate(digest)], "test")[0].score
        for name, (pruner, then) in pruners(quick).items():
            for budget in BUDGETS if size == 14 else FULL_SIZE_BUDGETS:
                path = folder / f"{name}-{budget}.json"
                if path.exists():
                    continue
                problem = Problem(
                    model=model,
                    structure=structure,
                    weights=digest,
                    executor=executor,
                    store=store,
                    budget=Budget.of({"macs": budget}),
                    seed=seed,
                )
                row = _row(name, budget, pruner, then, problem, executor, dense)
                path.write_text(json.dumps(asdict(row)))
                print(f"{folder.name}: {row}", flush=True)


def _row(
    name: str,
    budget: str,
    pruner: Pruner,
    then: str,
    problem: Problem,
    executor: LocalExecutor,
    dense: float,
) -> Row:
    spent: dict[Candidate, tuple[float, float, bool]] = {}

    def on_step(_: int, trials: Sequence[Trial]) -> None:
        for trial in trials:  # also what the ledger answers: a row costs what it would alone
            asked = trial.candidate
            looked_at = not asked.kept and asked.training is None
            before = spent.get(asked, (0.0, 0.0, False))
            if trial.dfe > before[0]:
                spent[asked] = (trial.dfe, trial.seconds, trial.probe or looked_at)

    winner = run_search(pruner.search(problem), executor, on_step)
    dfe = sum(each[0] for each in spent.values())
    seconds = sum(each[1] for each in spent.values())
    shared = sum(each[0] for each in spent.values() if each[2])
    if then == "reconstruct":
        winner = replace(winner, reconstruct=Reconstruction(problem.weights))
    elif then == "recalibrate":
        winner = replace(winner, recalibrate=4)
    before = executor.evaluate([winner], "test")[0]
    after = executor.evaluate([winner.with_training(replace(RECOVER, seed=problem.seed))], "test")
    stored = problem.store.get(after[0].trained())
    counts = {group: len(kept) for group, kept in stored.kept.items()}
    macs = problem.structure.cost(counts).macs / problem.structure.cost().macs
    return Row(name, budget, before.score, after[0].score, dense, macs, dfe, seconds, shared)


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of means and standard deviations over seeds."""
    text = [
        f"Dense: {_mean(sorted({100 * row.dense for row in rows}), 1)} %.",
        "",
        "| search | seeds | MACs kept | before | after | DFE | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    by: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by[row.budget, row.method].append(row)
    for budget in BUDGETS:
        for method in pruners(False):
            own = by.get((budget, method))
            if not own:
                continue
            text.append(
                f"| {method} | {len(own)} | {_mean([100 * r.macs for r in own], 1)} % "
                f"| {_mean([100 * r.before for r in own], 1)} "
                f"| {_mean([100 * r.after for r in own], 1)} "
                f"| {_mean([r.dfe for r in own], 1)} | {_mean([r.seconds for r in own], 0)} |"
            )
    sums = {}
    for method in pruners(False):
        each = [by[budget, method] for budget in BUDGETS]
        if all(each):
            own = sum(statistics.fmean([r.dfe - r.shared for r in some]) for some in each)
            sums[method] = own + statistics.fmean([r.shared for r in each[0]])
    shown = ", ".join(f"{method} {value:.0f}" for method, value in sums.items() if value > 0.5)
    return [*text, "", f"DFE of all three budgets together: {shown}."] if shown else text


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2 or digits == 0:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    """Runs what is left, and writes OUTPUT/automatic.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--full", action="store_true", help="also 28x28, one net and seed")
    parser.add_argument("--quick", action="store_true", help="few images: a smoke run")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    seeds = [0] if options.quick else [0, 1, 2]
    work: list[tuple[Any, ...]] = [(net, s, 14) for s in seeds for net in ("vgg", "residual")]
    if options.full:
        work.append(("residual", 0, 28))
    with ProcessPoolExecutor(options.processes) as pool:
        running = [pool.submit(run, *each, options.output, options.quick) for each in work]
        for each in running:
            each.result()
    print(write(options.output))


def write(output: Path) -> str:
    """Writes the table of all rows that are there, and returns it."""
    text = [__doc__.split("\n\n")[2].strip()]
    for net, size in (("vgg", 14), ("residual", 14), ("residual", 28)):
        rows = [
            Row(**json.loads(path.read_text()))
            for path in sorted(output.glob(f"{net}-{size}-seed*/*.json"))
        ]
        if rows:
            text += ["", f"## {net}, {size}x{size}", "", *table(rows)]
    path = output / "automatic.md"
    path.write_text("\n".join(text) + "\n")
    return path.read_text()


if __name__ == "__main__":
    main()
