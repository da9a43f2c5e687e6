"""How far latency tables are off: `OMP_NUM_THREADS=1 pytest -m benchmark -s tests/benchmarks/...`.

For a quiet machine. Where other processes share the cores, wall-clock time measures them as well;
`LATENCY_CLOCK=thread` counts the CPU time of the measuring thread instead (its threads must be
one), which leaves what they do to its caches.
"""

from __future__ import annotations

import os
import random
import time

import pytest
import torch

from jobs.tasks.fashion import MODELS
from raycompress.budget import Allocator, Budget
from raycompress.driver import run
from raycompress.structure import analyze, latency_table, measure, slim

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]

CLOCK = time.thread_time if os.environ.get("LATENCY_CLOCK") == "thread" else time.perf_counter
INPUT = torch.zeros(1, 1, 28, 28)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("name", list(MODELS))
def test_error_and_a_budget_of_60_percent(name, batch_size):
    model = MODELS[name]().eval()
    structure = analyze(model, INPUT)
    start = time.perf_counter()
    table = latency_table(model, structure, INPUT, batch_size=batch_size, checks=24, clock=CLOCK)
    seconds = time.perf_counter() - start
    error, residual = table.error, table.residual
    print(
        f"\n{name}, batch {batch_size}: dense {table.dense_ms:.3f} ms, overhead "
        f"{table.overhead_ms:.3f} ms, scale {table.scale:.2f}, measured in {seconds:.0f} s; "
        f"{error.num} random slim models: mean error {100 * error.mean:.1f} %, largest "
        f"{100 * error.max:.1f} %, bias {100 * error.bias:+.1f} %; "
        f"residual {100 * residual.mean:.1f} %"
    )
    names = tuple(group.name for group in structure.groups)
    allocator = Allocator(structure, names, Budget.of({"latency_ms": "60%"}), latency=table)
    models, predicted = {"dense": model}, {}
    rng = random.Random(0)
    for index in range(6):
        low = 1.0 if index == 0 else 0.3  # the first is uniform
        counts = allocator.fit({group: rng.uniform(low, 1.0) for group in names})
        kept = {group: range(count) for group, count in counts.items()}
        models[str(index)] = slim(model, structure, kept)
        predicted[str(index)] = table.latency_ms(counts) / table.dense_ms
    rows = measure(
        models, INPUT, batch_sizes=(batch_size,), repeats=60, clock=CLOCK, max_seconds=120
    )
    times = {row.name: row.min_ms for row in rows}
    ratios = {key: times[key] / times["dense"] for key in predicted}
    shown = ", ".join(f"{100 * ratio:.1f} %" for ratio in ratios.values())
    print(f"  fitted to 60 % (uniform, then random directions), fastest passes: {shown}")
    assert all(0.55 < value <= 0.6 for value in predicted.values())
    assert error.mean < 0.15
    assert abs(sum(ratios.values()) / len(ratios) - 0.6) < 0.1


@pytest.mark.parametrize("batch_size", [1, 64])
def test_job_with_a_budget_of_60_percent(batch_size, tmp_path):
    result = run(
        {
            "name": "latency",
            "task": "jobs.tasks.fashion:Fashion",
            "task_args": {"model": "residual", "num_train": 6_000},
            "model": {"pretrain": {"epochs": 1.0}},
            "pruners": [{"type": "L1Filter"}],
            "budgets": [{"latency_ms": "60%"}],
            "latency": {"batch_sizes": [batch_size], "repeats": 60},
            "cluster": {"executor": "local"},
            "tracking": {"uri": "none"},
            "output": str(tmp_path / "o"),
        }
    )
    (trial,) = result.trials
    (limit,) = trial.limits
    slim_ms, dense_ms = limit.measured, limit.dense
    print(
        f"\njob, batch {batch_size}: asked 60 %, predicted {limit.predicted:.3f} ms, measured "
        f"{slim_ms:.3f} of {dense_ms:.3f} ms (medians): {100 * slim_ms / dense_ms:.1f} %; "
        f"{trial.row('slim').macs / trial.row('dense').macs:.0%} of the multiply-adds"
    )
    print("  " + next(note for note in result.notes if note.startswith("Latency table")))
    assert abs(slim_ms / dense_ms - 0.6) < 0.15
