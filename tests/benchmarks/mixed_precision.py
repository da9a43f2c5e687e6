"""Mixed bits against equal bits at equal bytes, on Fashion-MNIST at 14x14, without training.

    python tests/benchmarks/mixed_precision.py OUTPUT [--seeds 0 1 2]

The residual net with 24,000 training images, 8 epochs; weights are trained once for each seed, or
taken from the output of quantizers.py, which has them under the same name. Inputs have 8 bits
everywhere. Equal bits are PTQ's; MixedPrecision may use 2 to 8 bits and as many bytes as the row of
equal bits takes. The search looks at validation data alone; the test split is scored once for each
row and selects nothing. Cost is in passes of the dense model over the validation split; probes
count in the first of a seed's searches alone, since all limits share them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from jobs.tasks.fashion import Fashion
from raycompress.candidate import Candidate
from raycompress.local import LocalExecutor
from raycompress.pruning import MixedPrecision, Problem
from raycompress.pruning.bit_costs import BitCosts
from raycompress.quantization import PTQ, Quantization
from raycompress.quantization.quantizer import Bits
from raycompress.search import run_search
from raycompress.structure import analyze
from raycompress.units import Evaluation
from raycompress.weights import Weights, WeightStore

EPOCHS = 8
EQUAL = (8, 5, 4, 3)

Rows = dict[str, tuple[float, float, float]]


def main() -> None:
    """Runs the seeds whose file isn't there, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: list[Rows] = []
    for seed in options.seeds:
        path = options.output / f"seed{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(run(seed, options.output), indent=1))
        found.append(json.loads(path.read_text()))
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


def run(seed: int, output: Path) -> Rows:
    """The rows of one seed: name -> bytes of the float model's, test score, cost of the search."""
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
    costs = BitCosts.of(problem.model, problem.structure)
    rows: Rows = {}

    def add(name: str, candidate: Candidate, cost: float = 0.0) -> int:
        """Judges a row; returns its bytes."""
        how = candidate.quantize
        size = costs.float_size
        if how is not None:
            size = costs.size({n: (bits.weight or 32, bits.input) for n, bits in how.choices})
        score = executor.evaluate([candidate], "test")[0].score
        rows[name] = (size / costs.float_size, score, cost)
        print(seed, name, rows[name], flush=True)
        return size

    add("float", Candidate(digest))
    for bits in EQUAL:
        choices = dict.fromkeys(costs.layers, Bits(weight=bits, input=8))
        equal = Candidate(digest, quantize=Quantization.of(PTQ(), choices))
        size = add(f"{bits} bits everywhere", equal)
        if bits == 8:
            continue
        before = executor.dfe
        for kind in ((8, 7, 6, 5, 4, 3, 2), (8, 4, 2)):
            pruner = MixedPrecision(size=float(size), weight_bits=kind)
            winner = run_search(pruner.search(problem), executor)
            names = "2 to 8" if len(kind) > 3 else "2, 4 or 8"
            spent = executor.dfe - before
            add(f"{names} bits, bytes of {bits}", winner, spent)
            before = executor.dfe
    return rows


if __name__ == "__main__":
    main()
