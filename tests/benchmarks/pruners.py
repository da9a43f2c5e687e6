"""All pruners on Fashion-MNIST against controls, in one command that goes on where it was stopped.

    python tests/benchmarks/pruners.py OUTPUT [--full] [--quick]

Images pooled to 14x14, 24,000 for training, three seeds; with --full also 28x28 and all images,
one seed. Each seed is three jobs: channels at half of the multiply-adds, single weights at 10 %
density, and lottery tickets from the initial weights at 10 % density. Every trial selects on the
validation split; the test split is scored once, at the end. The table goes to OUTPUT/pruners.md.

"epochs" is all training after the dense model's: the pruner's own and the recovery; from scratch,
the dense model's as well. --quick is a smoke run of few images, for the code and not for figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raycompress
from raycompress.results import JobResult

PRETRAIN, RECOVER = 8, 3
OWN = 3  # epochs that pruners which train have for themselves

CHANNELS: list[tuple[dict[str, Any], float]] = [
    ({"type": "RandomFilter"}, 0),
    ({"type": "L1Filter"}, 0),
    ({"type": "L2Filter"}, 0),
    ({"type": "FPGM"}, 0),
    ({"type": "ActivationAPoZRank"}, 0),
    ({"type": "ActivationMeanRank"}, 0),
    ({"type": "TaylorFO"}, 0),
    ({"type": "SimulatedAnnealing", "iterations": 10, "reconstruct": False}, 0),
    ({"type": "Iterative", "criterion": "l1", "rounds": 1, "epochs": OWN}, OWN),
    ({"type": "Iterative", "criterion": "l1", "rounds": OWN, "epochs": 1}, OWN),
    ({"type": "AGP", "criterion": "l1", "end": OWN - 1, "total": OWN}, OWN),
    ({"type": "SoftFilter", "intervals": OWN}, OWN),
    ({"type": "Slim", "epochs": OWN, "penalty": 1e-3}, OWN),
    ({"type": "ADMM", "units": "channels", "iterations": OWN, "retrain_epochs": 0}, OWN),
    ({"type": "FromScratch", "epochs": PRETRAIN + OWN}, PRETRAIN + OWN),
]
WEIGHTS: list[tuple[dict[str, Any], float]] = [
    ({"type": "Level", "sparsity": 0.9}, 0),
    ({"type": "LAMP", "sparsity": 0.9}, 0),
    ({"type": "Wanda", "sparsity": 0.9}, 0),
    (
        {"type": "Iterative", "criterion": "level", "sparsity": 0.9, "rounds": 1, "epochs": OWN},
        OWN,
    ),
    ({"type": "AGP", "final_sparsity": 0.9, "end": OWN - 1, "total": OWN}, OWN),
    ({"type": "ADMM", "sparsity": 0.9, "iterations": OWN, "retrain_epochs": 0}, OWN),
    ({"type": "MovementPruning", "sparsity": 0.9, "epochs": OWN}, OWN),
]
TICKETS: list[tuple[dict[str, Any], float]] = [
    ({"type": "LotteryTicket", "sparsity": 0.9, "rounds": 5, "epochs": OWN}, 6 * OWN),
    (
        {"type": "LotteryTicket", "sparsity": 0.9, "rounds": 5, "epochs": OWN, "reinit": True},
        6 * OWN,
    ),
]


@dataclass(frozen=True)
class Row:
    """One trial of one seed."""

    before: float
    test: float
    dense: float
    params: int
    macs: int
    speedup: float


def main() -> None:
    """Runs what is left of the jobs, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--full", action="store_true", help="also 28x28, all images, one seed")
    parser.add_argument("--quick", action="store_true", help="few images: a smoke run")
    options = parser.parse_args()
    settings: list[tuple[str, dict[str, Any], list[int]]] = [
        ("14x14", {"size": 14, "num_train": 512 if options.quick else 24_000}, [0, 1, 2])
    ]
    if options.quick:
        settings = [(name, arguments, seeds[:1]) for name, arguments, seeds in settings]
    if options.full:
        settings.append(("28x28", {}, [0]))
    text = [__doc__.split("\n\n")[2].strip()]
    for name, arguments, seeds in settings:
        rows: dict[str, list[Row]] = defaultdict(list)
        for seed in seeds:
            for kind, pruners in (
                ("channels", CHANNELS),
                ("weights", WEIGHTS),
                ("tickets", TICKETS),
            ):
                output = options.output / f"{name}-seed{seed}-{kind}"
                result = raycompress.run(_job(kind, pruners, arguments, seed, output))
                _collect(result, kind, pruners, output, rows)
        text += ["", f"## {name}, {len(seeds)} seeds", "", *_table(rows)]
        path = options.output / "pruners.md"
        path.write_text("\n".join(text) + "\n")
        print(path.read_text())


def _job(
    kind: str,
    pruners: list[tuple[dict[str, Any], float]],
    arguments: dict[str, Any],
    seed: int,
    output: Path,
) -> dict[str, Any]:
    tickets = kind == "tickets"
    return {
        "name": f"pruners-{kind}",
        "task": "jobs.tasks.fashion:Fashion",
        "task_args": arguments,
        "seed": seed,
        "seeds": [seed],
        "model": {} if tickets else {"pretrain": {"epochs": PRETRAIN}},
        "pruners": [entry for entry, _ in pruners],
        "budgets": [{"macs": "50%"}] if kind == "channels" else [],
        "recover": None if tickets else {"epochs": RECOVER, "lr": 0.05},
        "latency": {"batch_sizes": [64], "repeats": 20},
        "cluster": {"replicas": 1, "max_concurrent": 2},
        "tracking": {"uri": "none"},
        "output": str(output),
    }


def _collect(
    result: JobResult,
    kind: str,
    pruners: list[tuple[dict[str, Any], float]],
    output: Path,
    rows: dict[str, list[Row]],
) -> None:
    for trial, (entry, epochs) in zip(result.trials, pruners, strict=True):
        keys = ", ".join(f"{k} {v}" for k, v in entry.items() if k not in ("type", "sparsity"))
        total = epochs + (0 if kind == "tickets" else RECOVER)
        name = f"{kind} | {entry['type']}{f' ({keys})' if keys else ''} | {total:g}"
        found = json.loads((output / "trials" / trial.name / "result.json").read_text())
        final, dense = trial.rows[-1], trial.rows[0]
        rows[name].append(
            Row(
                before=found["score"],
                test=final.score_test,
                dense=dense.score_test,
                params=final.params if kind == "channels" else final.nonzero_params,
                macs=final.macs,
                speedup=dense.latency[0].median_ms / final.latency[0].median_ms,
            )
        )


def _table(rows: dict[str, list[Row]]) -> list[str]:
    def mean(values: list[float]) -> str:
        spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.2f}{spread}"

    lines = [
        "| units | pruner | epochs | validation before recovery, % | test, % | dense test, % | "
        "parameters kept | MACs | speed-up, batch 64 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, trials in rows.items():
        speed = statistics.mean(t.speedup for t in trials)
        lines.append(
            f"| {name} | {mean([t.before for t in trials])} | {mean([t.test for t in trials])} | "
            f"{mean([t.dense for t in trials])} | {statistics.mean(t.params for t in trials):.0f} "
            f"| {statistics.mean(t.macs for t in trials):.0f} | {speed:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
