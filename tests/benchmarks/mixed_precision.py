"""Mixed bits against equal bits at equal bytes, on Fashion-MNIST at 14x14, without training.

    python tests/benchmarks/mixed_precision.py OUTPUT [--seeds 0 1 2]

The residual net with 24,000 training images, 8 epochs; weights are trained once for each seed, or
taken from the output of quantizers.py, which has them under the same name. Inputs have 8 bits
everywhere. Equal bits are PTQ's; MixedPrecision may use 2 to 8 bits and as many bytes as the row of
equal bits takes. At the same bytes the dense model is also pruned by CurveSolver and then has 8
bits everywhere, and MixedPrecision may choose among the dense model and two widths of it. The
search looks at validation data alone; the test split is scored once for each row and selects
nothing. Cost is in passes of the dense model over the validation split; probes count in the first
of a seed's searches alone, since all limits share them. Finished rows are kept in OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from jobs.tasks.fashion import Fashion
from raycompress.budget import Budget
from raycompress.candidate import Candidate
from raycompress.local import LocalExecutor
from raycompress.pruning import CurveSolver, MixedPrecision, Problem
from raycompress.pruning.bit_costs import BitCosts
from raycompress.quantization import PTQ, Quantization
from raycompress.quantization.quantizer import Bits
from raycompress.search import run_search
from raycompress.structure import analyze
from raycompress.units import Evaluation
from raycompress.weights import Weights, WeightStore

EPOCHS = 8
EQUAL = (8, 5, 4, 3)
ALL = (8, 7, 6, 5, 4, 3, 2)
PRUNED = (4, 3)
"""Bytes at which pruning takes part: of so many bits everywhere."""
WIDTHS = (1.0, 0.8, 0.6)

Rows = dict[str, tuple[float, float, float]]


def main() -> None:
    """Makes the rows that aren't there, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: list[Rows] = []
    for seed in options.seeds:
        found.append(run(seed, options.output, options.output / f"seed{seed}.json"))
    lines = ["| | bytes, % of float | test, % | cost |", "|---|---|---|---|"]
    for name in found[0]:
        sizes, tests, costs = zip(*(rows[name] for rows in found), strict=True)
        spread = f" ± {100 * statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
        lines.append(
            f"| {name} | {100 * statistics.mean(sizes):.1f} | {100 * statistics.mean(tests):.2f}"
            f"{spread} | {statistics.mean(costs):.0f} |"
        )
    text = "\n".join(lines) + "\n"
    (options.output / "mixed_precision.md").write_text(text)
    print(text)


def run(seed: int, output: Path, path: Path) -> Rows:
    """The rows of one seed: name -> bytes of the float model's, test score, cost of the search.

    Those in the file at `path` aren't made again.
    """
    task = Fashion(model="residual", size=14, num_train=24_000)
    trained = output / f"14x14-seed{seed}-residual.safetensors"
    torch.manual_seed(seed)
    model = task.build_model()
    if not trained.exists():
        task.train(model, epochs=EPOCHS, seed=seed)
        save_file(model.state_dict(), trained)
    model.load_state_dict(load_file(trained))
    model.eval()
    structure = analyze(model, task.example_inputs(), form="module")
    store = WeightStore(output / f"weights{seed}")
    digest = store.put(Weights(model.state_dict(), {}))
    executor = LocalExecutor(task, structure, store, Evaluation(num_shards=16))
    problem = Problem(
        model=model,
        structure=structure,
        weights=digest,
        executor=executor,
        store=store,
        seed=seed,
    )
    rows: Rows = json.loads(path.read_text()) if path.exists() else {}
    whole = BitCosts.of(model, structure)

    def size(candidate: Candidate) -> int:
        how = candidate.quantize
        if how is None:
            return whole.float_size
        costs = BitCosts.of(model, structure, executor.counts(candidate))
        return costs.size({n: (bits.weight or 32, bits.input) for n, bits in how.choices})

    def add(name: str, find: Callable[[], Candidate]) -> None:
        """Judges a row, unless it is there."""
        if name in rows:
            return
        before = executor.dfe
        candidate = find()
        spent = executor.dfe - before
        score = executor.evaluate([candidate], "test")[0].score
        rows[name] = (size(candidate) / whole.float_size, score, spent)
        path.write_text(json.dumps(rows, indent=1))
        print(seed, name, rows[name], flush=True)

    def equal(bits: int, of: Candidate) -> Candidate:
        choices = dict.fromkeys(whole.layers, Bits(weight=bits, input=8))
        return replace(of, quantize=Quantization.of(PTQ(), choices))

    def mixed(**settings: Any) -> Candidate:
        return run_search(MixedPrecision(**settings).search(problem), executor)

    def pruned(limit: int) -> Candidate:
        """The widest in whole percents of the parameters that takes so many bytes in 8 bits."""
        for percent in range(100 * limit // size(equal(8, dense)), 0, -1):
            kept = replace(problem, budget=Budget.of({"params": f"{percent}%"}))
            found = equal(8, run_search(CurveSolver().search(kept), executor))
            if size(found) <= limit:
                return found
        raise AssertionError(limit)

    dense = Candidate(digest)
    add("float", lambda: dense)
    for bits in EQUAL:
        add(f"{bits} bits everywhere", partial(equal, bits, dense))
        if bits == 8:
            continue
        limit = size(equal(bits, dense))
        given = {"size": float(limit), "weight_bits": ALL}
        few = {**given, "weight_bits": (8, 4, 2)}
        add(f"2 to 8 bits, bytes of {bits}", partial(mixed, **given))
        add(f"2, 4 or 8 bits, bytes of {bits}", partial(mixed, **few))
        if bits in PRUNED:
            both = {"pruner": "CurveSolver", "widths": WIDTHS, **given}
            add(f"pruned, then 8 bits, bytes of {bits}", partial(pruned, limit))
            add(f"pruned and 2 to 8 bits, bytes of {bits}", partial(mixed, **both))
    return rows


if __name__ == "__main__":
    main()
