"""A toy task, and contract suites for algorithms, the project's own and third parties'.

A suite is a class with tests; inherit it in a test module and say what is tested:

    class TestMyPruner(PrunerContract):
        pruner = MyPruner(sparsity=0.5)
"""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from raycompress.budget import Budget
from raycompress.candidate import Candidate, Training, Trial
from raycompress.criteria import Criterion
from raycompress.ledger import Ledger
from raycompress.local import LocalExecutor
from raycompress.method import TrainingRun
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.quantization.quantizer import Quantization, Quantizer
from raycompress.search import Asked, Search, answer, run_search
from raycompress.structure import analyze
from raycompress.task import ClassificationTask, Split
from raycompress.weights import Weights, WeightStore

__all__ = [
    "CriterionContract",
    "PrunerContract",
    "QuantizerContract",
    "ToyNet",
    "ToyTask",
    "toy_problem",
]


class ToyNet(nn.Module):
    """A residual block between two convolutions, BatchNorm everywhere; 3 classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, 3) for images of shape (n, 2, h, w)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class ToyTask(ClassificationTask):
    """Three classes of noisy 6x6 images with two channels; learnt in seconds.

    Args:
        width: Channels of the first convolution.
        num: Examples in each split.
        seed: Of data and weights.
    """

    batch_size = 32

    def __init__(self, width: int = 8, num: int = 96, seed: int = 0) -> None:
        self.width, self.num, self.seed = width, num, seed

    def build_model(self) -> nn.Module:
        """The same random weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return ToyNet(self.width)

    def dataset(self, split: Split) -> TensorDataset:
        """Another draw for each split."""
        splits = ("train", "calibration", "validation", "test")
        generator = torch.Generator().manual_seed(1000 * self.seed + splits.index(split))
        labels = torch.randint(3, (self.num,), generator=generator)
        images = torch.randn(self.num, 2, 6, 6, generator=generator)
        patterns = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(self.seed))
        return TensorDataset(images + patterns[labels], labels)


def toy_problem(
    folder: str, budget: Mapping[str, str | float] | None = None, seed: int = 0
) -> tuple[Problem, LocalExecutor]:
    """A problem over the toy task, and who answers it."""
    task = ToyTask()
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs(), form="module")
    store = WeightStore(folder)
    digest = store.put(Weights(model.state_dict(), {}))
    executor = LocalExecutor(task, structure, store)
    problem = Problem(
        model=model,
        structure=structure,
        weights=digest,
        executor=executor,
        store=store,
        budget=None if budget is None else Budget.of(budget),
        seed=seed,
    )
    return problem, executor


class PrunerContract:
    """What every pruner must do; inherit it and set `pruner` (and `budget`).

    Attributes:
        pruner: The instance under test.
        budget: What the toy model may keep, if the pruner takes a budget.
        gradual: Only the winner meets the budget: the candidates before are on their way to it.
    """

    pruner: ClassVar[Pruner]
    budget: ClassVar[dict[str, str | float] | None] = None
    gradual: ClassVar[bool] = False

    def _run(self, seed: int = 0) -> tuple[Problem, LocalExecutor, Candidate, list[Trial]]:
        with tempfile.TemporaryDirectory() as folder:
            problem, executor = toy_problem(folder, self.budget, seed)
            trials: list[Trial] = []
            winner = run_search(
                self.pruner.search(problem), executor, lambda _, step: trials.extend(step)
            )
            executor.evaluate([winner])  # loads the weights before the folder goes
        return problem, executor, winner, trials

    def test_same_seed_same_winner(self) -> None:
        """Two runs agree to the bit."""
        _, _, first, before = self._run()
        _, _, second, after = self._run()
        assert first == second
        assert [t.shards for t in before] == [t.shards for t in after]

    def test_budget_is_met(self) -> None:
        """By every candidate, not only by the winner, unless the pruner is gradual."""
        problem, executor, winner, trials = self._run()
        if problem.budget is None or executor.rankings[winner.ranking].kind != "channels":
            return
        dense = problem.structure.cost()
        pruned = [t.candidate for t in trials if t.candidate.kept and not t.probe]
        before = [] if self.gradual else pruned
        for candidate in [winner, *before]:
            cost = problem.structure.cost(candidate.counts)
            assert problem.budget.excess(cost, dense) <= 1

    def test_no_unit_is_emptied(self) -> None:
        """Every group and every layer keeps something."""
        _, _, winner, _ = self._run()
        assert all(count >= 1 for _, count in winner.kept)

    def test_model_is_left_clean(self) -> None:
        """The dense model is read only."""
        with tempfile.TemporaryDirectory() as folder:
            problem, executor = toy_problem(folder, self.budget)
            before = {k: v.clone() for k, v in problem.model.state_dict().items()}
            run_search(self.pruner.search(problem), executor)
            for name, tensor in problem.model.state_dict().items():
                assert torch.equal(tensor, before[name]), name

    def test_stopped_anywhere_it_goes_on(self) -> None:
        """A search that starts again ends as an undisturbed one, and repeats no finished work."""
        with tempfile.TemporaryDirectory() as folder:
            problem, executor = toy_problem(folder, self.budget)
            answered: list[list[Trial]] = []
            search = self.pruner.search(problem)
            winner = run_search(search, executor, lambda _, step: answered.append(list(step)))
            for stop in {0, len(answered) // 2, len(answered)}:
                with Ledger(f"{folder}/ledger{stop}", "trial") as ledger:
                    task, structure = executor.host.task, problem.structure
                    first = LocalExecutor(task, structure, problem.store, ledger=ledger)
                    halted = self.pruner.search(replace(problem, executor=first))
                    asked = _start(halted)
                    for _ in range(stop):
                        asked = _go_on(halted, answer(asked, first)) if asked else None
                    halted.close()
                    again = LocalExecutor(task, structure, problem.store, ledger=ledger)
                    seen: list[list[Trial]] = []
                    assert winner == run_search(
                        self.pruner.search(replace(problem, executor=again)),
                        again,
                        lambda _, step, seen=seen: seen.append(list(step)),  # type: ignore[misc]
                    )
                    assert all(t.replayed for step in seen[:stop] for t in step)
                    for step, expected in zip(seen, answered, strict=True):
                        assert [t.weights for t in step] == [t.weights for t in expected]
                        assert [t.shards for t in step] == [t.shards for t in expected]

    def test_pickles(self) -> None:
        """A pruner travels to a trial's process."""
        assert pickle.loads(pickle.dumps(self.pruner)) == self.pruner


def _start(search: Search) -> Asked | None:
    try:
        return next(search)
    except StopIteration:
        return None


def _go_on(search: Search, trials: list[Trial]) -> Asked | None:
    try:
        return search.send(trials)
    except StopIteration:
        return None


class CriterionContract:
    """What every criterion must do; inherit it and set `criterion`.

    Attributes:
        criterion: The instance under test.
    """

    criterion: ClassVar[Criterion]

    def _scores(
        self, problem: Problem, executor: LocalExecutor, weights: str | None = None
    ) -> dict[str, Tensor]:
        """Scores as a search gets them, statistics collected by the host."""
        fine = self.criterion.kind == "weights"
        names = list(problem.layers() if fine else problem.groups())
        search = problem.scores(self.criterion, names, weights)
        try:
            asked = next(search)
            while True:
                asked = search.send(executor.evaluate(asked))
        except StopIteration as stop:
            scores: dict[str, Tensor] = stop.value
            return scores

    def test_one_finite_score_for_each_unit(self) -> None:
        """Shape (C,) for channels, the parameter's shape for single weights."""
        with tempfile.TemporaryDirectory() as folder:
            problem, executor = toy_problem(folder)
            scores = self._scores(problem, executor)
        assert scores
        for key, values in scores.items():
            if self.criterion.kind == "channels":
                assert values.shape == (problem.structure.group(key).num_channels,)
            else:
                assert values.shape == problem.model.get_parameter(key).shape
            assert torch.isfinite(values).all()

    def test_pure(self) -> None:
        """The same scores twice; model, gradients and modes are left as they were."""
        with tempfile.TemporaryDirectory() as folder:
            problem, executor = toy_problem(folder)
            before = {k: v.clone() for k, v in problem.model.state_dict().items()}
            first, again = (self._scores(problem, executor) for _ in range(2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        for name, tensor in problem.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert all(p.grad is None for p in problem.model.parameters())
        assert not any(module.training for module in problem.model.modules())

    def test_what_is_gone_scores_lowest(self) -> None:
        """Units that were removed before stay removed, whatever else is ranked."""
        with tempfile.TemporaryDirectory() as folder:
            problem, executor = toy_problem(folder)
            scores = self._scores(problem, executor)
            counts = {key: max(1, values.numel() // 2) for key, values in scores.items()}
            ranking = problem.ranking(self.criterion.kind, scores)
            asked = problem.candidate(counts, ranking, training=Training(0.0))
            weights = executor.evaluate([asked])[0].trained()
            after = self._scores(problem, executor, weights)
            stored = problem.store.get(weights)
        for key, values in after.items():
            if self.criterion.kind == "weights":
                gone = stored.state[key] == 0
            else:
                gone = torch.ones(len(values), dtype=torch.bool)
                gone[list(stored.kept[key])] = False
            assert torch.equal(torch.isneginf(values), gone)

    def test_travels_as_plain_data(self) -> None:
        """Into the ledger's keys and to replicas, and back."""
        candidate = Candidate("w", collect=self.criterion)
        assert Candidate.from_key(json.loads(json.dumps(candidate.key()))) == candidate
        assert pickle.loads(pickle.dumps(self.criterion)) == self.criterion


class QuantizerContract:
    """What every quantizer must do; inherit it and set `quantizer`.

    Attributes:
        quantizer: The instance under test.
    """

    quantizer: ClassVar[Quantizer]

    def _net(self) -> nn.Module:
        """Has negative inputs to every layer, as binary networks ask for."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.Hardtanh(),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.Hardtanh(),
                nn.Flatten(),
                nn.Linear(4 * 36, 3),
            ).eval()

    def _batches(self) -> list[Tensor]:
        data = ToyTask(num=32).dataset("calibration").tensors[0]
        return [data[:16], data[16:]]

    def _prepared(self) -> nn.Module:
        model = self._net()
        choices = self.quantizer.choose(model)
        self.quantizer.prepare(model, choices)
        self.quantizer.calibrate(model, lambda m, batch: m(batch), self._batches())
        return model.eval()

    def test_keys_of_the_float_model_stay(self) -> None:
        """With their values: what is trained is in them."""
        before = {key: value.clone() for key, value in self._net().state_dict().items()}
        after = self._prepared().state_dict()
        for key, value in before.items():
            assert torch.equal(after[key], value), key

    def test_it_changes_what_the_model_computes(self) -> None:
        """And all of it is finite."""
        batch = self._batches()[0]
        with torch.no_grad():
            out = self._prepared()(batch)
            assert torch.isfinite(out).all()
            assert not torch.equal(out, self._net()(batch))

    def test_eval_changes_no_buffer(self) -> None:
        """A forward pass in eval mode only reads."""
        model = self._prepared()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            model(10 * self._batches()[0])
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_copies_and_pickles_compute_the_same(self) -> None:
        """Also after a training step in between."""
        model, batch = self._prepared(), self._batches()[0]
        self._step(model)
        copied, sent = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        fresh = self._net()
        self.quantizer.prepare(fresh, self.quantizer.choose(fresh))
        fresh.eval().load_state_dict(model.state_dict())
        with torch.no_grad():
            for other in (copied, sent, fresh):
                assert torch.equal(model(batch), other(batch))
        for parameter in copied.parameters():
            parameter.data.zero_()
        with torch.no_grad():
            assert torch.equal(model(batch), sent(batch))  # the copy shares nothing

    def _step(self, model: nn.Module, autocast: bool = False) -> None:
        """One step of training, and back to eval mode."""
        task = ToyTask(num=32)
        run = TrainingRun(
            model=model,
            task=task,
            structure=analyze(self._net(), task.example_inputs(), form="module"),
            masks={},
            device=torch.device("cpu"),
            weights=lambda digest: Weights({}, {}),
            build=lambda digest: model,
        )
        images, labels = task.dataset("train").tensors
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with ExitStack() as around, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for method in self.quantizer.methods(model):
                around.enter_context(method.around(run))
            model.train()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = task.loss(model(images), [images, labels])
            torch.autograd.backward(loss)
            optimizer.step()
            model.eval()

    def test_it_trains(self) -> None:
        """Every weight gets a gradient and moves, with AMP and without."""
        for autocast in (False, True):
            model = self._prepared()
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            self._step(model, autocast)
            for name, parameter in model.named_parameters():
                assert torch.isfinite(parameter).all(), name
                if name.endswith(".weight") and parameter.dim() > 1:
                    assert not torch.equal(parameter, before[name]), name

    def test_travels_as_plain_data(self) -> None:
        """Into the ledger's keys and to replicas, and back."""
        how = Quantization.of(self.quantizer, self.quantizer.choose(self._net()))
        assert Quantization.from_key(json.loads(json.dumps(how.key()))) == how
        assert pickle.loads(pickle.dumps(how)) == how
        assert hash(how) == hash(Quantization.of(self.quantizer, dict(how.choices)))
