"""The model host: builds candidates from the weights that it holds, trains and evaluates them.

One host stands in each replica, and one in the `LocalExecutor`; they run the same code, so that a
search is answered alike everywhere.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from raycompress.builder import Builder
from raycompress.candidate import Candidate, Shard, Training
from raycompress.collect import Collector, Probe
from raycompress.errors import StorageError, TaskError
from raycompress.identity import data_digest, numeric_class, task_digest
from raycompress.masks import masked_copy
from raycompress.method import TrainingRun, train_within
from raycompress.on_runtime import on_runtime
from raycompress.quantization.quantizer import Quantization
from raycompress.storage import Place, place_of, staged, writing
from raycompress.structure import Structure
from raycompress.structure.latency.measure import LatencyRow, measure
from raycompress.structure.latency.table import LatencyTable, latency_table
from raycompress.task import SPLITS, Progress, Split, Task
from raycompress.units import Evaluation, HostInfo, Unit, UnitResult, lacks_memory
from raycompress.weights import Weights, WeightStore

__all__ = ["MAX_BUILT", "ModelHost"]

MAX_BUILT = 8
"""Slim models that are kept while their candidates race."""


class ModelHost(Builder):
    """A builder that trains and evaluates what it builds: answers units.

    Args:
        task: The user's task, constructed in this process.
        structure: Analysis of the task's model.
        store: Where trained weights are read and written.
        evaluation: Settings.
        device: Where the model runs.
        name: In results and logs.
    """

    def __init__(
        self,
        task: Task,
        structure: Structure,
        store: WeightStore,
        evaluation: Evaluation | None = None,
        device: torch.device | str = "cpu",
        name: str = "local",
    ) -> None:
        super().__init__(task, structure, store, evaluation, device)
        self.name = name
        self.progress: tuple[int, int, float] | None = None
        self._whole = type(task).evaluate is not Task.evaluate
        self._built: OrderedDict[Candidate, nn.Module] = OrderedDict()

    def info(self) -> HostInfo:
        """What the executor must know of this host."""
        datasets = {split: self._splits.dataset(split) for split in SPLITS}  # type: ignore[arg-type]
        return HostInfo(
            task=task_digest(self.task),
            data=data_digest(datasets),
            num_examples={split: len(data) for split, data in datasets.items()},
            steps_per_epoch=self._steps_per_epoch(),
            numeric_class=numeric_class(self.device, self.evaluation.threads),
            whole=self._whole,
        )

    def run(self, unit: Unit, progress: Progress | None = None) -> UnitResult:
        """Trains or evaluates; an exception in it is the candidate's failure, and an answer."""
        start = time.perf_counter()
        try:
            with self.evaluation.own_threads():
                if unit.candidate.collect is not None:
                    digest = self._collect(unit.candidate, unit.candidate.collect)
                    result = UnitResult(weights=digest)
                elif unit.candidate.training is not None:
                    digest = self._train(unit.candidate, unit.candidate.training, progress)
                    result = UnitResult(weights=digest)
                else:
                    result = UnitResult(shards=self._evaluate(unit))
        except StorageError:  # no candidate's failure
            raise
        except Exception as error:
            self._built.clear()
            message = str(error).strip().splitlines()
            result = UnitResult(
                failure=f"{type(error).__name__}: {message[0] if message else ''}",
                again=lacks_memory(error),
            )
        finally:
            self.progress = None
        seconds = time.perf_counter() - start
        return replace(result, seconds=seconds, worker=self.name)

    def latency(
        self,
        candidates: Mapping[str, Candidate],
        batch_sizes: Sequence[int],
        repeats: int,
        max_seconds: float | None = None,
        runtime: str = "",
    ) -> list[LatencyRow]:
        """Measures candidates against each other on this host's device, interleaved.

        On a runtime: on the host's CPU; see `on_runtime`.
        """
        failures: dict[str, str] = {}
        with self.evaluation.own_threads(), tempfile.TemporaryDirectory() as folder:
            if runtime:
                models, failures = on_runtime(self, candidates, runtime, batch_sizes, Path(folder))
            else:
                models = {name: self.build(each) for name, each in candidates.items()}
            rows = measure(
                models,
                self.task.example_inputs(),
                batch_sizes=batch_sizes,
                repeats=repeats,
                max_seconds=max_seconds,
                device="cpu" if runtime else self.device,
            )
        failed = itertools.product(failures.items(), batch_sizes)
        return [*rows, *(LatencyRow.failed(name, size, why) for (name, why), size in failed)]

    def latency_table(
        self, batch_size: int, folder: str | Place | None, max_seconds: float
    ) -> LatencyTable:
        """The latency table of the task's model on this host's device; see `latency_table`."""
        place = None if folder is None else place_of(folder)
        stage = nullcontext(None) if place is None else staged(place)
        full = nullcontext() if place is None else writing(place)
        with full, self.evaluation.own_threads(), stage as local:
            return latency_table(
                self._base,
                self.structure,
                self.task.example_inputs(),
                batch_size=batch_size,
                device=self.device,
                folder=local,
                max_seconds=max_seconds,
            )

    def _train(self, candidate: Candidate, training: Training, progress: Progress | None) -> str:
        epochs = training.in_epochs(self._steps_per_epoch())
        how = self._quantization(candidate, epochs)
        model = self.build(candidate.with_training(None))
        kept = self.kept(candidate)
        methods = (
            training.methods if how is None else (*training.methods, *how.quantizer.methods(model))
        )
        run = TrainingRun(
            model=model,
            task=copy.copy(self.task),
            structure=self.structure,
            masks=self.masks(candidate) if candidate.kept and not kept else {},
            device=self.device,
            weights=self.weights,
            build=lambda digest: self.build(Candidate(digest)),
        )

        def report(step: int, num_steps: int, loss: float) -> None:
            self.progress = (step, num_steps, loss)
            if progress is not None:
                progress(step, num_steps, loss)

        train_within(
            run,
            methods,
            epochs=epochs,
            lr=training.lr,
            seed=training.seed,
            progress=report,
        )
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        plain = {name: tuple(indices.tolist()) for name, indices in kept.items()}
        extra = {name: tensor.cpu() for name, tensor in run.extra.items()}
        record = None if how is None else how.key()
        return self.store.put(Weights(state, plain, extra, record))

    def _quantization(self, candidate: Candidate, epochs: float) -> Quantization | None:
        """How a candidate is quantized, now or in its weights already; checked.

        Args:
            candidate: Evaluated or trained.
            epochs: Passes over the train split that it is trained for.

        Raises:
            ConfigError: Its quantizer needs training and gets none, or has none and gets it.
        """
        how = self.quantization(candidate)
        if how is not None and self.weights(candidate.weights).quantization is None:
            how.check_training(epochs, self._steps_per_epoch())
        return how

    def _steps_per_epoch(self) -> int:
        return -(-len(self._splits.dataset("train")) // self.task.batch_size)

    def _collect(self, candidate: Candidate, collector: Collector) -> str:
        """Collects statistics of a candidate in dense shapes; returns the digest they have."""
        self._load(candidate.weights)
        model = masked_copy(self._base, self.masks(candidate)).to(self.device).eval()
        batches = self._splits.batches
        probe = Probe(
            model=model,
            structure=self.structure,
            task=self.task,
            device=self.device,
            batches=lambda: iter(batches("calibration")),
        )
        return self.store.put(Weights(collector.collect(probe), {}))

    def _evaluate(self, unit: Unit) -> tuple[Shard, ...]:
        self._quantization(unit.candidate, 0.0)
        model = self._model(unit.candidate)
        if self._whole:
            value = self.task.evaluate(model, unit.split)
            if value is None:
                raise TaskError(f"{type(self.task).__name__}.evaluate returned None")
            if not math.isfinite(value):
                raise TaskError(f"evaluate must return a finite number, got {float(value)}")
            return (Shard(1, float(value), -float(value)),)  # such a task has no loss to sum
        with torch.inference_mode():
            return tuple(self._shard(model, unit.split, index) for index in unit.shards)

    def _model(self, candidate: Candidate) -> nn.Module:
        """A candidate's model; those in a race are kept for its next round."""
        whole = replace(candidate, shards=None)
        if whole not in self._built:
            while len(self._built) >= (1 if candidate.shards is None else MAX_BUILT):
                self._built.popitem(last=False)
            self._built[whole] = self.build(whole)
        self._built.move_to_end(whole)
        return self._built[whole]

    def _shard(self, model: nn.Module, split: Split, index: int) -> Shard:
        count, score, loss = 0, 0.0, 0.0
        for batch in self._splits.batches(split, index):
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
            ):
                outputs = self.task.forward(model, batch)
            scores = self.task.score(outputs, batch)
            if scores.dim() != 1:
                raise TaskError(
                    f"{type(self.task).__name__}.score must return one number for each example, "
                    f"got shape {tuple(scores.shape)}"
                )
            size = scores.shape[0]
            count += size
            score += float(scores.double().sum())
            loss += float(self.task.loss(outputs, batch)) * size
        if not (math.isfinite(score) and math.isfinite(loss)):
            raise TaskError(
                f"score and loss must be finite, got {score} and {loss} on {split} shard {index}"
            )
        return Shard(count, score, loss)
