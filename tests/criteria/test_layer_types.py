"""Every criterion of channels on every layer type, coupled layers, ties, and permutations."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Given, probe_of, scores_of
from torch import Tensor, nn

from raycompress.criteria import CRITERIA, L1, L2, Criterion, GeometricMedian, Taylor
from raycompress.masks import masked_copy, prune_order
from raycompress.structure import slim, verify

CHANNELS = {name: c for name, c in CRITERIA.items() if c.kind == "channels"}
LOOKING = {name: c for name, c in CHANNELS.items() if name != "random"}  # at the model
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net(first: nn.Module, norm: type[nn.Module], second: nn.Module) -> nn.Module:
    channels = 8
    return nn.Sequential(first, norm(channels), nn.ReLU(), second)


NETS = {
    "Conv1d": lambda: net(nn.Conv1d(4, 8, 3), nn.BatchNorm1d, nn.Conv1d(8, 3, 3)),
    "Conv2d": lambda: net(nn.Conv2d(4, 8, 3), nn.BatchNorm2d, nn.Conv2d(8, 3, 3)),
    "Conv3d": lambda: net(nn.Conv3d(4, 8, 3), nn.BatchNorm3d, nn.Conv3d(8, 3, 3)),
    "ConvTranspose1d": lambda: net(
        nn.ConvTranspose1d(4, 8, 3, stride=2), nn.BatchNorm1d, nn.Conv1d(8, 3, 3)
    ),
    "ConvTranspose2d": lambda: net(
        nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d, nn.ConvTranspose2d(8, 3, 3)
    ),
    "ConvTranspose3d": lambda: net(nn.ConvTranspose3d(4, 8, 2), nn.BatchNorm3d, nn.Conv3d(8, 3, 3)),
    "Linear": lambda: net(nn.Linear(4, 8), nn.BatchNorm1d, nn.Linear(8, 3)),
    "grouped": lambda: net(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d, nn.Conv2d(8, 3, 3)),
    "depthwise": lambda: net(
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8)),
        nn.BatchNorm2d,
        nn.Conv2d(8, 3, 3),
    ),
    "grouped transposed": lambda: net(
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 8, 3, groups=4)),
        nn.BatchNorm2d,
        nn.Conv2d(8, 3, 3),
    ),
}


def inputs_of(name: str) -> Tensor:
    dims = {"1d": 1, "3d": 3, "ar": 0}.get(name[-2:], 2)
    size = (6, 4, *[6] * dims)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


class Task(Given):
    """Trains to large squares of the output, of any shape."""

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return outputs.square().mean() + outputs.mean()


def task_of(model: nn.Module, x: Tensor) -> Task:
    return Task(model, x, torch.zeros(len(x)).long(), 3)


@pytest.mark.parametrize("criterion", CHANNELS.values(), ids=list(CHANNELS))
@pytest.mark.parametrize("layer", NETS)
def test_all_layer_types(layer, criterion, randomised):
    model, x = randomised(NETS[layer]()), inputs_of(layer)
    probe = probe_of(task_of(model, x), 3)
    scores = scores_of(criterion, probe)
    (name,) = [group.name for group in probe.structure.groups]
    group = probe.structure.group(name)
    assert scores[name].shape == (group.num_channels,) and scores[name].isfinite().all()
    assert len(scores[name].unique()) > 1  # it tells channels apart
    # What is ranked can be removed.
    order = prune_order(scores[name])
    kept = {name: order[group.num_channels // 2 :].sort().values}
    masked = masked_copy(model, probe.structure.masks(kept))
    small = slim(model, probe.structure, kept)
    assert verify(masked, small, (x,)).kind == "exact"


@pytest.mark.parametrize(
    ("criterion", "rows"),
    [
        (L1(), lambda w: w.abs().sum(1)),
        (L2(), lambda w: w.square().sum(1).sqrt()),
        (GeometricMedian(), lambda w: (w[:, None] - w[None]).square().sum(2).sqrt().sum(1)),
    ],
)
@pytest.mark.parametrize("layer", ["Conv1d", "Conv3d", "ConvTranspose2d", "Linear"])
def test_filters_are_read_along_the_right_dim(layer, criterion, rows, randomised):
    model = randomised(NETS[layer]())
    probe = probe_of(task_of(model, inputs_of(layer)), 3)
    weight = model[0].weight.detach().double()
    filters = weight.transpose(0, 1) if "Transpose" in layer else weight
    expected = rows(filters.flatten(1))
    found = scores_of(criterion, probe)["0"]
    torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-9, atol=0)


def test_grouped_channels_are_whole_where_they_must_be(randomised):
    """A grouped convolution after another layer: its channels and the other's go together."""
    model = randomised(
        nn.Sequential(
            nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 3, 1)
        )
    )
    probe = probe_of(task_of(model, inputs_of("Conv2d")), 3)
    (group,) = probe.structure.groups
    first = model[0].weight.detach().double().abs().flatten(1).sum(1)
    second = model[2].weight.detach().double().abs().flatten(1).sum(1)
    assert group.num_channels == 3  # whole groups of the convolution
    rows = [first.view(3, 2).sum(1), second.view(3, 4).sum(1)]
    expected = sum(row / row.mean() for row in rows)
    torch.testing.assert_close(scores_of(L1(), probe)[group.name], expected)


class Residual(nn.Module):
    """Three layers share their channels; one has them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.inner, self.bn2 = nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.outer, self.bn3 = nn.Conv2d(10, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn3(self.outer(torch.relu(self.bn2(self.inner(x))))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def permuted(model: Residual, shared: Tensor, inner: Tensor) -> Residual:
    """The same function with filters, norms and the consumers' inputs in another order."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, out, into in (
            (other.stem, shared, None),
            (other.inner, inner, shared),
            (other.outer, shared, inner),
            (other.head, None, shared),
        ):
            weight = layer.weight if out is None else layer.weight[out]
            layer.weight.copy_(weight if into is None else weight[:, into])
            if out is not None:
                layer.bias.copy_(layer.bias[out])
        for norm, order in ((other.bn1, shared), (other.bn2, inner), (other.bn3, shared)):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(tensor[order])
    return other


@pytest.mark.parametrize("criterion", LOOKING.values(), ids=list(LOOKING))
def test_permuted_filters_have_permuted_masks(criterion, randomised):
    model = randomised(Residual()).double()
    generator = torch.Generator().manual_seed(1)
    orders = {
        "stem": torch.randperm(8, generator=generator),
        "inner": torch.randperm(10, generator=generator),
    }
    x = inputs_of("Conv2d").double()
    other = permuted(model, orders["stem"], orders["inner"]).eval()
    torch.testing.assert_close(other(x), model(x))
    found = scores_of(criterion, probe_of(task_of(model, x), 3))
    moved = scores_of(criterion, probe_of(task_of(other, x), 3))
    for name, order in orders.items():
        torch.testing.assert_close(moved[name], found[name][order], rtol=1e-9, atol=1e-12)
        half = len(order) // 2
        gone = set(prune_order(found[name])[:half].tolist())
        there = prune_order(moved[name])[:half]
        assert {int(order[i]) for i in there} == gone


@pytest.mark.parametrize("criterion", LOOKING.values(), ids=list(LOOKING))
def test_equal_channels_tie_exactly_and_go_by_index(criterion):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 4), nn.Flatten()
    ).double()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.fill_(0.25)
            layer.bias.fill_(0.5)
    scores = scores_of(criterion, probe_of(task_of(model, inputs_of("Conv2d").double()), 3))["0"]
    order = prune_order(scores)
    assert order.tolist() == list(range(8))


def test_coupled_layers_are_scored_as_one(randomised):
    model = randomised(Residual())
    probe = probe_of(task_of(model, inputs_of("Conv2d")), 3)
    assert [g.name for g in probe.structure.groups] == ["stem", "inner"]

    def filters(layer: nn.Conv2d) -> Tensor:
        norms = layer.weight.detach().double().abs().flatten(1).sum(1)
        return norms / norms.mean()

    expected = filters(model.stem) + filters(model.outer)
    found: dict[str, Criterion] = {
        "sum": L1(),
        "mean": L1(combine="mean"),
        "max": L1(combine="max"),
    }
    results = {name: scores_of(c, probe)["stem"] for name, c in found.items()}
    torch.testing.assert_close(results["sum"], expected)
    torch.testing.assert_close(results["mean"], expected / 2)
    torch.testing.assert_close(
        results["max"], torch.maximum(filters(model.stem), filters(model.outer))
    )
    # Taylor isn't normalised: it compares across layers as it is.
    taylor = scores_of(Taylor(), probe)
    statistics = Taylor().collect(probe)
    assert torch.equal(taylor["stem"], statistics["stem"])


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("criterion", CHANNELS.values(), ids=list(CHANNELS))
def test_gpu_agrees_with_the_cpu(criterion, randomised):
    x = inputs_of("Conv2d").double()
    on_cpu = scores_of(criterion, probe_of(task_of(randomised(Residual()).double(), x), 3))
    model = randomised(Residual()).double()
    on_gpu = scores_of(criterion, probe_of(task_of(model, x), 3, "cuda"))
    for name, scores in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], scores, rtol=1e-7, atol=1e-10)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("name", ["apoz", "mean_activation", "taylor", "taylor_weight"])
def test_gpu_with_autocast_inside_of_the_task(name, randomised):
    class Cast(Task):
        def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return super().forward(model, batch).float()

    model, x = randomised(Residual()), inputs_of("Conv2d")
    plain = scores_of(CRITERIA[name], probe_of(task_of(model, x), 3, "cuda"))
    cast = scores_of(CRITERIA[name], probe_of(Cast(model, x, torch.zeros(6).long(), 3), 3, "cuda"))
    for group, scores in plain.items():
        assert not torch.equal(cast[group], scores)
        torch.testing.assert_close(cast[group], scores, rtol=0.1, atol=0.1 * float(scores.mean()))


@pytest.mark.gpu
@no_gpu
def test_gpu_recurrent_layers(randomised):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gru = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.gru(torch.relu(self.embed(x)))[0][:, -1])
            return logits

    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    model = randomised(Recurrent()).double()
    probes = [probe_of(task_of(copy.deepcopy(model), x), 3, d) for d in ("cpu", "cuda")]
    for name in ("taylor", "apoz", "mean_activation"):
        cpu, gpu = (scores_of(CRITERIA[name], probe) for probe in probes)
        for group, scores in cpu.items():
            torch.testing.assert_close(gpu[group], scores, rtol=1e-7, atol=1e-10)
    assert probes[1].model.embed.weight.is_cuda
