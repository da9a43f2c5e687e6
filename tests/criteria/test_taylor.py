"""First-order Taylor: formulas by hand and by autograd, and the change of the loss itself."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Given, probe_of, scores_of
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from raycompress.candidate import Candidate
from raycompress.criteria import L1, Criterion, MeanActivation, Taylor
from raycompress.errors import ConfigError, TaskError
from raycompress.local import LocalExecutor
from raycompress.masks import masked_copy
from raycompress.pruning import TaylorFO
from raycompress.testing import ToyTask, toy_problem
from raycompress.units import Evaluation

TAYLORS = [Taylor(), Taylor(form="weight")]


class Gated(nn.Module):
    """Two convolutions whose outputs are added, so that they share their channels."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 5, 3), nn.Conv2d(2, 5, 3)
        self.norm_a = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.norm_b = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.head = nn.Linear(5, 3)
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm_a(self.a(x)), self.norm_b(self.b(x))
        if self.gate is not None:
            a, b = a * self.gate[:, None, None], b * self.gate[:, None, None]
        logits: Tensor = self.head(torch.relu(a + b).mean((2, 3)))
        return logits


def images(num: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num, 2, 6, 6, generator=generator),
        torch.randint(3, (num,), generator=generator),
    )


def mini_batches(task: Given, size: int) -> list[Tensor]:
    """Indices of the examples of each mini-batch."""
    order = torch.randperm(len(task.data), generator=torch.Generator().manual_seed(0))
    return list(order.split(size))


@pytest.mark.parametrize("norm", [True, False])
def test_gate_form_is_the_squared_gradient_of_a_gate(norm, randomised):
    model = randomised(Gated(norm)).double()
    x, labels = images()
    task = Given(model, x.double(), labels, 8)
    probe = probe_of(task)
    found = Taylor().collect(probe)["a"]
    expected = torch.zeros(5).double()
    for part in mini_batches(task, 8):
        gated = copy.deepcopy(model)
        gated.gate = torch.ones(5).double().requires_grad_()
        loss = nn.functional.cross_entropy(gated(task.data.tensors[0][part]), labels[part])
        expected += torch.autograd.grad(loss, gated.gate)[0].square() / 3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert expected.min() > 0


@pytest.mark.parametrize("norm", [True, False])
def test_weight_form_sums_over_filters_and_biases_and_leaves_norms_out(norm, randomised):
    model = randomised(Gated(norm)).double()
    x, labels = images()
    task = Given(model, x.double(), labels, 8)
    found = Taylor(form="weight").collect(probe_of(task))["a"]
    parameters = [model.a.weight, model.a.bias, model.b.weight, model.b.bias]
    expected = torch.zeros(5).double()
    for part in mini_batches(task, 8):
        loss = nn.functional.cross_entropy(model(x.double()[part]), labels[part])
        for own, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            expected += (own * slope).detach().square().reshape(5, -1).sum(1) / 3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_gate_form_predicts_what_a_small_step_of_the_gate_does(randomised):
    model = randomised(Gated(True)).double()
    x, labels = images()
    task = Given(model, x.double(), labels, 24)
    found = Taylor().collect(probe_of(task))["a"]
    for channel in range(5):
        losses = []
        for step in (1e-5, -1e-5):
            model.gate = torch.ones(5).double()
            model.gate[channel] += step
            losses.append(task.loss(model(x.double()), (x, labels)).item())
        assert ((losses[0] - losses[1]) / 2e-5) ** 2 == pytest.approx(float(found[channel]), 1e-5)


class Mean(Given):
    """The loss is the mean output."""

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return outputs.mean()


def two_layers() -> nn.Sequential:
    """y = 1 * (2 x1 - x2 + 1) + 3 * (x1 + 4 x2 - 2)."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -1.0], [1.0, 4.0]]))
        model[0].bias.copy_(torch.tensor([1.0, -2.0]))
        model[1].weight.copy_(torch.tensor([[1.0, 3.0]]))
    return model


def test_by_hand_squares_of_mini_batches_are_averaged():
    # Mini-batches of one example: gradients of row 1 are (x1, x2, 1), of row 2 three times that.
    task = Mean(two_layers(), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2).long(), 1)
    # Row 1: x = (1, 0): 2 + 1 = 3; x = (0, 1): -1 + 1 = 0. Row 2: 3 (1 - 2) = -3, 3 (4 - 2) = 6.
    found = Taylor().collect(probe_of(task))["0"]
    assert found.tolist() == [(9 + 0) / 2, (9 + 36) / 2]
    # One by one: row 1: 4 + 1 and 1 + 1; row 2: 9 + 36 and 144 + 36.
    found = Taylor(form="weight").collect(probe_of(task))["0"]
    assert found.tolist() == [(5 + 2) / 2, (45 + 180) / 2]
    # One mini-batch of both: the average comes first. Row 1: (3 + 0) / 2; row 2: (-3 + 6) / 2.
    found = Taylor(batch_size=2).collect(probe_of(task))["0"]
    assert found.tolist() == [2.25, 2.25]
    # Each counts by its number of examples: of three examples, two and one.
    task = Mean(two_layers(), torch.eye(2)[[0, 0, 0]], torch.zeros(3).long(), 2)
    assert Taylor().collect(probe_of(task))["0"].tolist() == [9, 9]


@pytest.mark.parametrize("criterion", TAYLORS)
def test_the_jobs_batches_change_nothing(tmp_path, criterion):
    found = set()
    for size in (7, 96):
        problem, executor = toy_problem(str(tmp_path / str(size)))
        executor = LocalExecutor(
            ToyTask(), problem.structure, problem.store, evaluation=Evaluation(batch_size=size)
        )
        trial = executor.evaluate([Candidate(problem.weights, collect=criterion)])[0]
        assert trial.failure is None
        found.add(trial.weights)
    assert len(found) == 1  # to the bit


@pytest.mark.parametrize("criterion", TAYLORS)
def test_the_model_is_left_as_it_was(criterion, randomised):
    model = randomised(Gated(True))
    model.a.weight.requires_grad_(False)
    model.b.bias.grad = torch.full((5,), 7.0)
    before = copy.deepcopy(model.state_dict())
    probe = probe_of(Given(model, *images(), 8))
    with torch.no_grad():  # as its caller may have it
        frozen = criterion.collect(probe)["a"]
    assert not model.a.weight.requires_grad and model.b.weight.requires_grad
    assert model.b.bias.grad.eq(7).all()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["b.bias"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model.requires_grad_(True)
    assert torch.equal(criterion.collect(probe)["a"], frozen)


@pytest.mark.parametrize("criterion", TAYLORS)
def test_flags_are_put_back_where_the_loss_fails(criterion, randomised):
    class Broken(Given):
        def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return outputs.sum() * float("nan")

    model = randomised(Gated(True)).requires_grad_(False)
    with pytest.raises(TaskError, match="must return a finite scalar, got nan"):
        criterion.collect(probe_of(Broken(model, *images(), 8)))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("criterion", TAYLORS)
def test_scaling_the_loss_scales_all_scores(criterion, randomised):
    class Scaled(Given):
        def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return 8 * super().loss(outputs, batch)

    model = randomised(Gated(True))
    one = criterion.collect(probe_of(Given(model, *images(), 8)))["a"]
    eight = criterion.collect(probe_of(Scaled(model, *images(), 8)))["a"]
    torch.testing.assert_close(eight, 64 * one)


@pytest.mark.parametrize("criterion", TAYLORS)
def test_dead_channels_score_zero(criterion, randomised):
    model = randomised(Gated(True))
    probe = probe_of(Given(model, *images(), 8))
    masked = masked_copy(model, probe.structure.masks({"a": [0, 2, 4]}))
    found = criterion.collect(probe_of(Given(masked, *images(), 8)))["a"]
    assert found[[1, 3]].tolist() == [0, 0] and found[[0, 2, 4]].min() > 0


def test_rescaling_layers_changes_magnitude_only(randomised):
    # relu(a x) = a relu(x): the same function.
    plain = randomised(
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 4), nn.Flatten())
    ).double()
    scaled = copy.deepcopy(plain)
    factors = torch.logspace(-1, 1, 6).double()
    with torch.no_grad():
        scaled[0].weight.mul_(factors[:, None, None, None])
        scaled[0].bias.mul_(factors)
        scaled[2].weight.div_(factors[:, None, None])
    x, labels = images()
    found = [
        {c: scores_of(c, probe_of(Given(m, x.double(), labels, 8)))["0"] for c in (*TAYLORS, L1())}
        for m in (plain, scaled)
    ]
    for criterion in TAYLORS:
        torch.testing.assert_close(found[0][criterion], found[1][criterion], rtol=1e-9, atol=0)
    assert not torch.equal(found[0][L1()].argsort(), found[1][L1()].argsort())


def test_recurrent_layers_work(randomised):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm = nn.Linear(4, 6), nn.LSTM(6, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.lstm(torch.relu(self.embed(x)))[0][:, -1])
            return logits

    model = randomised(Recurrent())
    x = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0))
    found = Taylor().collect(probe_of(Given(model, x, torch.arange(8) % 3, 4)))
    assert found["embed"].min() > 0


class Digits(nn.Module):
    """A residual block, so that a group has several norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.fc1, self.fc2 = nn.Linear(80, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(torch.relu(x + self.bn2(self.conv2(x))), 2)
        x = torch.relu(self.bn3(self.conv3(x)))
        x = torch.relu(self.fc1(nn.functional.max_pool2d(x, 2).flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits


@pytest.fixture(scope="module")
def trained() -> Given:
    digits = load_digits()
    inputs = torch.tensor(digits.images[:800, None] / 16, dtype=torch.float32)
    torch.manual_seed(0)
    task = Given(Digits(), inputs, torch.tensor(digits.target[:800]), 64)
    task.train(task.model, epochs=5, seed=0)
    return task


def test_correlates_with_leave_one_out_loss_as_the_papers_claim(trained):
    probe = probe_of(trained, 400)
    inputs, labels = trained.data.tensors

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(trained.loss(model(inputs), (inputs, labels)))

    dense, changes = loss(probe.model), []
    for group in probe.structure.groups:
        for channel in range(group.num_channels):
            kept = [c for c in range(group.num_channels) if c != channel]
            without = masked_copy(probe.model, probe.structure.masks({group.name: kept}))
            changes.append(abs(loss(without) - dense))
    assert len(changes) == 12 + 20 + 24

    def rank_correlation(criterion: Criterion) -> float:
        scores = scores_of(criterion, probe)
        return float(spearmanr(torch.cat(list(scores.values())), changes).statistic)

    generator = torch.Generator().manual_seed(0)
    chance = max(
        float(spearmanr(torch.rand(len(changes), generator=generator), changes).statistic)
        for _ in range(20)
    )
    gate, weight = (rank_correlation(c) for c in TAYLORS)
    mean = rank_correlation(MeanActivation())
    assert gate > 0.8
    assert gate > mean > chance and weight > mean


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Taylor(form="both"), "Taylor.form must be 'gate' or 'weight', got 'both'"),
        (lambda: Taylor(batches=-1), "Taylor.batches must be at least 0, got -1"),
        (lambda: TaylorFO(form="x"), "TaylorFO.form must be 'gate' or 'weight', got 'x'"),
        (lambda: TaylorFO(batch_size=-2), "TaylorFO.batch_size must be at least 0, got -2"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
