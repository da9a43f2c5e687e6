"""On a GPU: core torch alone, with AMP. `pytest -m gpu`; skipped where there is no CUDA device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raycompress.candidate import Candidate, Training
from raycompress.criteria import CRITERIA, Criterion
from raycompress.local import LocalExecutor
from raycompress.masks import hold, masked_copy
from raycompress.pruning import AGP, L1Filter, Level, MovementPruning, Problem
from raycompress.reconstruction import Reconstruction
from raycompress.search import run_search
from raycompress.structure import analyze, slim, verify
from raycompress.task import Progress
from raycompress.testing import ToyTask, toy_problem
from raycompress.training import Toward
from raycompress.weights import Weights, WeightStore

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Halves(ToyTask):
    """Trains by float16 with a GradScaler and a fused Adam, as many loops do."""

    def train(
        self,
        model: nn.Module,
        *,
        epochs: float,
        lr: float | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """A loop of the user's own."""
        device = torch.device(device)
        data = self.dataset("train")
        optimizer = torch.optim.Adam(
            model.parameters(), lr=1e-3 if lr is None else lr, weight_decay=1e-3, fused=True
        )
        scaler = torch.amp.GradScaler(device.type)
        num_steps = round(epochs * -(-len(data) // self.batch_size))
        step = 0
        model.train()
        while step < num_steps:
            for batch in self.batches(data, range(len(data)), self.batch_size, device):
                with torch.autocast(device.type, torch.float16):
                    loss = self.loss(self.forward(model, batch), batch)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                step += 1
                if progress is not None:
                    progress(step, num_steps, float(loss.detach()))
                if step == num_steps:
                    break
        model.eval()


def on_gpu(folder: str, task: ToyTask | None = None) -> tuple[Problem, LocalExecutor]:
    """The toy problem with a host on the GPU."""
    task = ToyTask() if task is None else task
    model = task.build_model().eval()
    structure = analyze(model, task.example_inputs(), form="module")
    store = WeightStore(folder)
    digest = store.put(Weights(model.state_dict(), {}))
    executor = LocalExecutor(task, structure, store, device=DEVICE)
    return Problem(
        model=model, structure=structure, weights=digest, executor=executor, store=store
    ), executor


def scores_of(criterion: Criterion, problem: Problem, executor: LocalExecutor) -> dict[str, Tensor]:
    names = list(problem.layers() if criterion.kind == "weights" else problem.groups())
    search = problem.scores(criterion, names)
    try:
        asked = next(search)
        while True:
            asked = search.send(executor.evaluate(asked))
    except StopIteration as stop:
        scores: dict[str, Tensor] = stop.value
        return scores


def test_a_model_on_the_gpu_is_analysed_slimmed_and_verified():
    task = ToyTask()
    model = task.build_model().eval().to(DEVICE)
    (x,) = task.example_inputs()
    structure = analyze(model, (x.to(DEVICE),))
    kept = {"conv1": torch.arange(0, 8, 2), "conv3": torch.arange(5)}
    masks = structure.masks(kept)
    small = slim(model, structure, kept)
    assert all(p.is_cuda == (DEVICE == "cuda") for p in small.parameters())
    masked = masked_copy(model, masks)
    verdict = verify(masked, small, (x.to(DEVICE),), dtype=torch.float64)
    assert verdict.kind == "exact", verdict
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.allclose(masked(x.to(DEVICE)), small(x.to(DEVICE)), atol=0.05)


@pytest.mark.parametrize("task", [ToyTask(), Halves()], ids=["bfloat16", "float16 scaled"])
def test_held_weights_stay_zero_with_amp(task):
    model = task.build_model().to(DEVICE)
    masks = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) > 0.5
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
    before = copy.deepcopy(model)
    steps = []

    def look(step: int, num_steps: int, loss: float) -> None:
        steps.append(step)
        for name, mask in masks.items():
            assert (model.get_parameter(name)[~mask.to(DEVICE)] == 0).all()

    with hold(model, masks):
        task.train(model, epochs=17, device=DEVICE, progress=look)
    assert len(steps) == 51
    assert not torch.equal(model.conv3.weight, masked_copy(before, masks).conv3.weight)


@pytest.mark.parametrize("task", [ToyTask(), Halves()], ids=["bfloat16", "float16 scaled"])
def test_the_pull_is_as_strong_with_amp(tmp_path, task):
    problem, executor = on_gpu(str(tmp_path), task)
    target = {"conv3.weight": torch.zeros_like(problem.model.conv3.weight)}
    digest = problem.store.put(Weights(target, {}))
    norms = []
    for rho in (0.0, 1.0):
        methods = (Toward(target=digest, rho=rho),) if rho else ()
        asked = Candidate(problem.weights, training=Training(10.0, lr=0.02, methods=methods))
        trial = executor.evaluate([asked])[0]
        assert trial.failure is None
        state = problem.store.get(trial.trained()).state
        norms.append(float(state["conv3.weight"].norm()))
    assert norms[1] < 0.5 * norms[0]


@pytest.mark.parametrize("task", [ToyTask(), Halves()], ids=["bfloat16", "float16 scaled"])
@pytest.mark.parametrize(
    "pruner",
    [
        MovementPruning(sparsity=0.75, epochs=6),
        AGP(final_sparsity=0.75, end=2),
        AGP(criterion="taylor", final_sparsity=0.5, end=2),
    ],
    ids=["movement", "AGP", "AGP of channels"],
)
def test_training_pruners_end_exact(tmp_path, task, pruner):
    problem, executor = on_gpu(str(tmp_path), task)
    winner = run_search(pruner.search(problem), executor)
    assert executor.evaluate([winner])[0].failure is None
    mask = executor.host.masks(winner)["conv3.weight"]
    channels = getattr(pruner, "criterion", "") == "taylor"
    assert int(mask.sum()) == (8 * 4 * 9 if channels else 288)
    state = problem.dense(winner.weights).state_dict()["conv3.weight"]
    assert (state[~mask] == 0).all() and (state[mask] != 0).any()


@pytest.mark.parametrize("name", [name for name in CRITERIA if CRITERIA[name].needs_data])
def test_statistics_are_those_of_the_cpu(tmp_path, name):
    tables = []
    for make in (lambda f: toy_problem(f), on_gpu):
        problem, executor = make(str(tmp_path))
        tables.append(scores_of(CRITERIA[name], problem, executor))
    for key, expected in tables[0].items():
        found = tables[1][key]
        assert found.device.type == "cpu"
        # TF32 may be on in convolutions.
        torch.testing.assert_close(
            found.double(), expected.double(), rtol=2e-2, atol=2e-2 * float(expected.abs().mean())
        )


@pytest.mark.parametrize("pruner", [L1Filter(sparsity=0.5), Level(sparsity=0.7)])
def test_reconstruction_lowers_the_loss(tmp_path, pruner):
    problem, executor = on_gpu(str(tmp_path))
    training = Candidate(problem.weights, training=Training(8.0))
    dense = executor.evaluate([training])[0].trained()
    problem = replace(problem, model=problem.dense(dense), weights=dense)
    winner = run_search(pruner.search(problem), executor)
    again = replace(winner, reconstruct=Reconstruction(dense=dense, batches=1))
    plain, better = executor.evaluate([winner, again])
    assert plain.failure is None and better.failure is None
    assert better.loss < plain.loss


def test_compiled_models_are_pruned_and_slimmed():
    task = ToyTask()
    model = task.build_model().eval().to(DEVICE)
    (x,) = task.example_inputs()
    structure = analyze(model, (x.to(DEVICE),))
    kept = {"conv1": torch.arange(4), "conv3": torch.arange(8)}
    small = slim(model, structure, kept)
    compiled: Callable[[Tensor], Tensor] = torch.compile(small)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x.to(DEVICE)),
            masked_copy(model, structure.masks(kept))(x.to(DEVICE)),
            rtol=1e-2,
            atol=1e-2,
        )
