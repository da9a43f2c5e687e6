"""Structured OBS against least squares of torch's own, brute force, and models that need it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Given, probe_of, scores_of
from torch import Tensor, nn

from jobs.tasks.digits import Digits
from raycompress.budget import Allocator, Budget
from raycompress.criteria import CRITERIA, OBS, obs
from raycompress.criteria.surgeon import Reader, removal_order
from raycompress.errors import ConfigError, EvaluationError
from raycompress.layer_rows import windows
from raycompress.local import LocalExecutor
from raycompress.masks import masked_copy, prune_order
from raycompress.pruning.pruner import Problem
from raycompress.reconstruction import Reconstruction, lost_inputs, reconstruct
from raycompress.search import Search, run_search
from raycompress.structure import analyze, slim
from raycompress.weights import Weights, WeightStore

DAMPING = 0.01


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def reader(x: Tensor, w: Tensor, blocks: Tensor) -> Reader:
    return Reader(x.T @ x, w, blocks, float((x @ w).square().sum()))


def error(x: Tensor, w: Tensor, blocks: Tensor, gone: list[int], damping: float = DAMPING) -> float:
    """min ||X W' - X W||^2 + ridge ||W' - W||^2 over W' without the channels, by lstsq.

    Weights of inputs that are always zero count as zero.
    """
    w = w * x.any(dim=0)[:, None]
    ridge = damping * float((x.T @ x).diagonal().mean())
    rows = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1]).double()])
    kept = torch.ones(x.shape[1], dtype=torch.bool)
    kept[blocks[gone].flatten()] = False
    right = rows @ w
    if not kept.any():
        return float(right.square().sum())
    solution = torch.linalg.lstsq(rows[:, kept], right, driver="gelsd").solution
    return float((rows[:, kept] @ solution - right).square().sum())


def two_readers() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Correlated inputs; of 6 channels with 3 and 2 inputs, and some that nobody removes."""
    mixed = []
    for seed, size, inputs, outputs in ((0, 3, 20, 5), (1, 2, 13, 30)):
        x = random(60, inputs, seed=seed) @ random(inputs, inputs, seed=seed + 10)
        blocks = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))
        blocks = blocks[: 6 * size].view(6, size)
        mixed.append((x, random(inputs, outputs, seed=seed + 20), blocks))
    return mixed


def test_claimed_error_is_the_least_squares_error_for_every_prefix():
    readers = two_readers()
    order, costs = removal_order([reader(*each) for each in readers], DAMPING)
    assert sorted(order.tolist()) == list(range(6))
    for count in range(1, 7):
        gone = order[:count].tolist()
        expected = sum(
            error(x, w, blocks, gone) / float((x @ w).square().sum()) for x, w, blocks in readers
        )
        assert float(costs[:count].sum()) == pytest.approx(expected, rel=1e-6)


def test_each_removal_is_the_cheapest_by_brute_force():
    readers = two_readers()
    order, _ = removal_order([reader(*each) for each in readers], DAMPING)
    gone: list[int] = []
    for channel in order.tolist():
        totals = {
            c: sum(
                error(x, w, b, [*gone, c]) / float((x @ w).square().sum()) for x, w, b in readers
            )
            for c in range(6)
            if c not in gone
        }
        assert min(totals, key=lambda c: totals[c]) == channel
        gone.append(channel)


def test_uncorrelated_inputs_go_by_the_norm_of_their_weights():
    w, blocks = random(12, 7), torch.arange(12).view(4, 3)
    norms = w.square().sum(1).view(4, 3).sum(1)
    order, costs = removal_order([Reader(torch.eye(12).double(), w, blocks, 1.0)], DAMPING)
    assert order.tolist() == norms.argsort().tolist()
    torch.testing.assert_close(costs, (1 + DAMPING) * norms[order])


def test_of_a_pair_of_copies_one_goes_at_no_cost_and_the_other_is_kept():
    x = random(50, 6)
    x[:, 4] = 2 * x[:, 1]
    w = random(6, 5, seed=1) + 1
    order, costs = removal_order([reader(x, w, torch.arange(6)[:, None])], 1e-9)
    assert int(order[0]) in (1, 4) and float(costs[0]) < 1e-6
    assert int(order[1]) not in (1, 4) and float(costs[1]) > 1e-2


def test_rank_r_inputs_lose_the_rest_at_no_cost():
    x = random(50, 4) @ random(4, 9, seed=1)
    _, costs = removal_order([reader(x, random(9, 3, seed=2), torch.arange(9)[:, None])], 1e-10)
    assert float(costs[:5].sum()) < 1e-6 < 1e-3 < float(costs[5])


def test_inputs_that_are_always_zero_cost_nothing():
    x = random(40, 5)
    x[:, [1, 3]] = 0
    w = 100 * random(5, 4, seed=1)
    order, costs = removal_order([reader(x, w, torch.arange(5)[:, None])], DAMPING)
    assert order[:2].tolist() == [1, 3] and costs[:2].tolist() == [0, 0]
    nothing = Reader(torch.zeros(5, 5).double(), w, torch.arange(5)[:, None], 0.0)
    order, costs = removal_order([nothing], DAMPING)
    assert order.tolist() == list(range(5)) and not costs.any()


def test_rounding_that_makes_a_matrix_singular_is_an_error():
    x = random(50, 2) @ random(2, 6, seed=1)
    with pytest.raises(EvaluationError, match=r"raise OBS\.damping"):
        removal_order([reader(x, random(6, 3), torch.arange(6)[:, None])], 1e-300)


class Residual(nn.Module):
    """Two layers read the channels of the stem, one of them with a stride; a flatten at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 6, 1)
        self.last = nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        logits: Tensor = self.head(torch.relu(self.last(x)).flatten(1))
        return logits


def task_of(model: nn.Module, num: int = 24, size: int = 6, channels: int = 2) -> Given:
    images = random(num, channels, size, size).to(next(model.parameters()).dtype)
    return Given(model, images, torch.arange(num) % 3, 8)


def inputs_of(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a layer, at all positions, with a column of ones for a bias."""
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())):
        model(x)
    rows = torch.cat([windows(layer, each).reshape(-1, layer.weight[0].numel()) for each in seen])
    return rows if layer.bias is None else torch.cat([rows, torch.ones(len(rows), 1)], dim=1)


def weights_of(layer: nn.Module) -> Tensor:
    matrix = layer.weight.detach().flatten(1).T
    return matrix if layer.bias is None else torch.cat([matrix, layer.bias.detach()[None]])


@pytest.fixture
def everywhere(monkeypatch) -> None:
    monkeypatch.setattr(obs, "MAX_POSITIONS", 10_000)


@pytest.mark.usefixtures("everywhere")
def test_readers_of_a_model_are_found_and_their_errors_measured(randomised):
    """A group that two layers read, one that one reads, and one read after a flatten."""
    model = randomised(Residual()).double()
    task = task_of(model)
    scores = scores_of(OBS(), probe_of(task))
    kernel = torch.arange(9)
    expected = {
        "stem": [
            (model.inner, torch.arange(6)[:, None] * 9 + kernel),
            (model.last, torch.arange(6)[:, None] * 9 + kernel),
        ],
        "inner": [(model.outer, torch.arange(5)[:, None])],
        "last": [(model.head, torch.arange(4)[:, None] * 9 + kernel)],
    }
    assert list(scores) == list(expected)
    for name, layers in expected.items():
        order = prune_order(scores[name]).tolist()
        for count in range(1, len(order) + 1):
            total = 0.0
            for layer, blocks in layers:
                x, w = inputs_of(model, layer, task.data.tensors[0]), weights_of(layer)
                total += error(x, w, blocks, order[:count]) / float((x @ w).square().sum())
            assert float(scores[name][order[count - 1]]) == pytest.approx(total, rel=1e-6)


@pytest.mark.usefixtures("everywhere")
def test_the_error_is_that_of_the_reconstructed_model(randomised):
    """What the surgeon claims, less its ridge, is what reconstruction then measures."""
    model = randomised(Residual()).double()
    task = task_of(model)
    probe = probe_of(task)
    scores = scores_of(OBS(damping=1e-9), probe)["inner"]
    order = prune_order(scores)
    kept = {"inner": order[2:].sort().values}
    small = slim(model, probe.structure, kept)
    layers, outputs = lost_inputs(probe.structure, kept)
    (found,) = reconstruct(
        small, model, layers, outputs, lambda m, b: m(b), [task.data.tensors[0]], damping=1e-9
    )
    assert found.layer == "outer"
    assert found.after == pytest.approx(float(scores[order[1]]), rel=1e-5)


@pytest.mark.parametrize("limit", [4, 10_000])
def test_how_examples_are_cut_into_batches_changes_nothing(limit, randomised, monkeypatch):
    monkeypatch.setattr(obs, "MAX_POSITIONS", limit)
    found = []
    for size in (5, 24):
        task = task_of(randomised(Residual()).double())
        found.append(scores_of(OBS(), probe_of(task, size)))
    for name, scores in found[0].items():
        torch.testing.assert_close(found[1][name], scores, rtol=1e-9, atol=0)


def test_a_pass_for_each_group_finds_the_same(randomised, monkeypatch):
    probe = probe_of(task_of(randomised(Residual()).double()))
    passes = []

    def counted(source=probe.batches):
        passes.append(0)
        return source()

    probe = replace(probe, batches=counted)
    whole = scores_of(OBS(), probe)
    assert len(passes) == 1
    monkeypatch.setattr(obs, "MAX_ENTRIES", 1)
    parts = scores_of(OBS(), probe)
    assert len(passes) == 1 + 3
    assert all(torch.equal(parts[name], scores) for name, scores in whole.items())


class Twice(nn.Module):
    """One layer reads the channels twice; a concatenation gives another both groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 6)
        self.both, self.head = nn.Linear(11, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1)[:, :8].unflatten(1, (2, 4)).unbind(1)
        hidden = [
            torch.relu(self.both(torch.cat([torch.relu(self.a(r)), torch.relu(self.b(r))], 1)))
            for r in rows
        ]
        logits: Tensor = self.head(hidden[0]) + self.head(input=hidden[1])
        return logits


def test_calls_add_up_and_other_groups_channels_stay(randomised):
    model = randomised(Twice()).double()
    task = task_of(model)
    scores = scores_of(OBS(), probe_of(task))
    x, w = inputs_of(model, model.both, task.data.tensors[0]), weights_of(model.both)
    for name, first, count in (("a", 0, 5), ("b", 5, 6)):
        blocks = torch.arange(first, first + count)[:, None]
        order = prune_order(scores[name]).tolist()
        for number in range(1, count + 1):
            expected = error(x, w, blocks, order[:number]) / float((x @ w).square().sum())
            assert float(scores[name][order[number - 1]]) == pytest.approx(expected, rel=1e-6)
    assert scores["both"].isfinite().all()  # of the layer that is also called by keyword


@pytest.mark.usefixtures("everywhere")
def test_behind_a_depthwise_convolution_the_pointwise_one_reads(randomised):
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(6, 4, 1))
    model = randomised(model).double()
    task = task_of(model)
    scores = scores_of(OBS(), probe_of(task))["0"]
    x, w = inputs_of(model, model[4], task.data.tensors[0]), weights_of(model[4])
    order = prune_order(scores).tolist()
    for count in range(1, 7):
        expected = error(x, w, torch.arange(6)[:, None], order[:count])
        expected /= float((x @ w).square().sum())
        assert float(scores[order[count - 1]]) == pytest.approx(expected, rel=1e-6)


def test_scores_rise_strictly_in_the_order_of_removal(randomised):
    model = randomised(Residual()).double()
    with torch.no_grad():  # three dead channels, which cost nothing
        for channel in (1, 3, 4):
            model.inner.weight[channel] = 0
            model.inner.bias[channel] = -1
    scores = scores_of(OBS(), probe_of(task_of(model)))
    for values in scores.values():
        assert len(values.unique()) == len(values) and values.min() >= 0
    order = prune_order(scores["inner"]).tolist()
    assert order[:3] == [1, 3, 4] and float(scores["inner"][4]) < 1e-300


def test_channels_that_are_gone_already_go_first(randomised):
    model = randomised(Residual()).double()
    probe = probe_of(task_of(model))
    before = scores_of(OBS(), probe)
    masked = masked_copy(model, probe.structure.masks({"stem": [0, 2, 5], "last": [1, 2]}))
    after = scores_of(OBS(), replace(probe, model=masked))
    assert prune_order(after["stem"])[:3].tolist() == [1, 3, 4]
    assert prune_order(after["last"])[:2].tolist() == [0, 3]
    assert float(before["stem"].min()) > 1e-6


@pytest.mark.usefixtures("everywhere")
def test_layers_too_wide_for_one_matrix_are_taken_place_by_place(randomised, monkeypatch):
    model = randomised(Residual()).double()
    task = task_of(model)
    monkeypatch.setattr(obs, "MAX_COLUMNS", 30)  # inner and last have 54 inputs, head 36
    scores = scores_of(OBS(), probe_of(task))
    x, w = inputs_of(model, model.head, task.data.tensors[0]), weights_of(model.head)
    places = torch.arange(4)[:, None] * 9 + torch.arange(9)
    order = prune_order(scores["last"]).tolist()
    for count in range(1, 5):
        total = 0.0
        for place in places.unbind(1):
            columns = torch.cat([place, torch.tensor([36])])
            blocks = torch.arange(4)[:, None]
            total += error(x[:, columns], w[columns], blocks, order[:count])
        total /= float((x @ w).square().sum())
        assert float(scores["last"][order[count - 1]]) == pytest.approx(total, rel=1e-6)


def test_more_channels_than_fit_are_refused_before_anything_runs(randomised, monkeypatch):
    model = randomised(Residual())
    probe = probe_of(task_of(model))
    monkeypatch.setattr(obs, "MAX_COLUMNS", 5)
    OBS().check(model, probe.structure, ["inner", "last"])
    with pytest.raises(ConfigError, match="'stem' has 6 channels, and 'obs' compares at most 5"):
        OBS().check(model, probe.structure, ["inner", "stem"])
    assert "stem" in {g.name for g in probe.structure.groups}
    assert OBS().collect(probe)["last"].isfinite().all()  # the others don't suffer


def test_groups_without_a_reader_go_by_their_squared_activations(randomised):
    model = randomised(
        nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 3, 3))
    ).double()
    task = task_of(model)
    found = scores_of(OBS(), probe_of(task))["0"]
    energy = model[:2](task.data.tensors[0]).detach().square().mean((0, 2, 3))
    order = energy.argsort()
    torch.testing.assert_close(found[order], (energy[order] / energy.sum()).cumsum(0))
    with pytest.raises(EvaluationError, match="group '0': no layer that reads its channels"):
        OBS().scores(model, probe_of(task).structure, ["0"], {})


def test_inputs_that_are_not_finite_are_an_error(randomised):
    model = randomised(Residual())
    with torch.no_grad():
        model.stem.bias[2] = float("inf")
    with pytest.raises(EvaluationError, match="what reads group 'stem' doesn't get finite inputs"):
        OBS().collect(probe_of(task_of(model)))


def test_reconstructed_digits_lose_less_than_by_l1(tmp_path):
    """30 % of the MACs in uniform widths, no training: the mean loss over three seeds."""
    losses: dict[str, list[float]] = {"l1": [], "obs": []}
    for seed in range(3):
        task = Digits(16)
        torch.manual_seed(seed)
        model = task.build_model()
        task.train(model, epochs=6, seed=seed)
        structure = analyze(model.eval(), task.example_inputs(), form="module")
        store = WeightStore(tmp_path / str(seed))
        digest = store.put(Weights(model.state_dict(), {}))
        executor = LocalExecutor(task, structure, store)
        problem = Problem(
            model=model,
            structure=structure,
            weights=digest,
            executor=executor,
            store=store,
            budget=Budget.of({"macs": "30%"}),
        )
        for name, found in losses.items():

            def search(
                name: str = name, problem: Problem = problem, digest: str = digest
            ) -> Search:
                groups = tuple(problem.groups())
                ranking = yield from problem.rank(CRITERIA[name], groups)
                counts = Allocator(problem.structure, groups, problem.budget).fit(
                    dict.fromkeys(groups, 1.0)
                )
                candidate = problem.candidate(counts, ranking)
                return replace(candidate, reconstruct=Reconstruction(digest))

            winner = run_search(search(), executor)
            found.append(executor.evaluate([winner])[0].loss)
    mean = {name: sum(found) / 3 for name, found in losses.items()}
    assert mean["obs"] < 0.9 * mean["l1"], losses


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"damping": 0.0}, "OBS.damping must be above 0, got 0.0"),
        ({"damping": float("nan")}, "OBS.damping must be above 0, got nan"),
        ({"batches": -1}, "OBS.batches must be at least 0, got -1"),
    ],
)
def test_bad_fields(given, message):
    with pytest.raises(ConfigError, match=message):
        OBS(**given)
