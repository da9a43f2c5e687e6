"""Activations that the network really has: where they are found, and what is averaged of them."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Given, probe_of, scores_of
from torch import Tensor, nn

from raycompress.collect import Probe
from raycompress.criteria import ActivationCriterion, APoZ, MeanActivation
from raycompress.errors import ConfigError, EvaluationError, StructureError
from raycompress.pruning import ActivationAPoZRank, ActivationMeanRank
from raycompress.structure import Member, analyze
from raycompress.structure.activations import activation_sites
from raycompress.structure.watch import watch

BOTH = [APoZ(), MeanActivation()]


def images(num: int = 12, size: int = 8, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num, channels, size, size, generator=generator),
        torch.randint(3, (num,), generator=generator),
    )


def sites_of(model: nn.Module, x: Any) -> dict[str, list[str]]:
    model = model.eval()
    structure = analyze(model, (x,))
    sites = activation_sites(model, structure, model, x)
    names: dict[str, list[str]] = {group.name: [] for group in structure.groups}
    for site in sites.found:
        names[site.group].append(site.name)
    return names


def brute_force(criterion: ActivationCriterion, activations: Tensor, dim: int = 1) -> Tensor:
    rows = activations.double().movedim(dim, 0).flatten(1)
    return (rows > 0).double().mean(1) if isinstance(criterion, APoZ) else rows.abs().mean(1)


class Styles(nn.Module):
    """BatchNorm, then ReLU in the way that is asked for; a residual sum; a pool after it."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9)
        self.relu = nn.ReLU(inplace=style == "in place")
        self.head = nn.Linear(9 * 16, 3)
        self.seen: list[Tensor] = []

    def activate(self, x: Tensor) -> Tensor:
        out = torch.relu_(x) if self.style == "functional in place" else x
        if self.style in ("in place", "shared module"):
            out = self.relu(x)
        elif self.style == "functional":
            out = F.relu(x)
        elif self.style == "clamp":
            out = x.clamp(min=0)
        self.seen.append(out.clone())
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.activate(self.bn1(self.conv1(x)))
        x = self.activate(self.bn2(self.conv2(x)) + x)
        x = F.max_pool2d(self.activate(self.bn3(self.conv3(x))), 2)
        logits: Tensor = self.head(x.flatten(1))
        return logits


STYLES = ["functional", "functional in place", "in place", "shared module", "clamp"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("criterion", BOTH)
def test_equals_brute_force_after_norm_sum_and_relu_but_before_pooling(
    style, criterion, randomised
):
    model = randomised(Styles(style))
    x, labels = images()
    probe = probe_of(Given(model, x, labels, 5), 5)  # batches of 5, 5 and 2
    model.seen = []
    found = criterion.collect(probe)
    model.seen = []
    with torch.no_grad():
        model(x)
    first, added, last = (brute_force(criterion, seen) for seen in model.seen)
    name = "relu relu" if style in ("in place", "shared module") else "relu"
    name = "clamp" if style == "clamp" else name
    expected = {
        f"conv1 @ {name} 1": first,
        f"conv1 @ {name} 2": added,
        f"conv3 @ {name} 1": last,
    }
    assert set(found) == set(expected)
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-6)
    # What a hook on the convolution would have seen is another thing.
    conv = brute_force(criterion, F.relu(model.conv1(x)))
    assert (conv - first).abs().max() > 0.05
    scores = scores_of(criterion, probe)
    if isinstance(criterion, APoZ):
        torch.testing.assert_close(scores["conv1"], (found[f"conv1 @ {name} 1"] + added) / 2)


def test_a_channel_that_is_never_active_goes_first(randomised):
    model = randomised(Styles("functional"))
    with torch.no_grad():
        model.bn3.bias[4], model.bn3.bias[7] = -1e3, 1e3
    probe = probe_of(Given(model, *images(), 6), 6)
    scores = scores_of(APoZ(), probe)["conv3"]
    assert scores[4] == 0 and scores[7] == 1 == scores.max()
    weak = scores_of(MeanActivation(), probe)["conv3"]
    assert weak[4] == 0 and weak.argmax() == 7


@pytest.mark.parametrize("criterion", BOTH)
def test_the_batches_change_nothing(criterion, randomised):
    model = randomised(Styles("functional")).double()
    x, labels = images()
    task = Given(model, x.double(), labels, 4)
    whole = criterion.collect(probe_of(task, 12))
    for size in (1, 5):
        parts = criterion.collect(probe_of(task, size))
        for key, values in whole.items():
            torch.testing.assert_close(parts[key], values, rtol=1e-12, atol=1e-15)
    few = type(criterion)(batches=2).collect(probe_of(task, 3))
    six = criterion.collect(probe_of(Given(model, x[:6].double(), labels[:6], 4), 6))
    for key, values in six.items():
        torch.testing.assert_close(few[key], values, rtol=1e-12, atol=1e-15)


def test_memory_holds_one_batch_and_no_activations(randomised):
    model = randomised(Styles("functional"))
    model.activate = F.relu  # keeps nothing itself
    live: list[int] = []

    class Counted(Given):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            out = super().forward(model, batch)
            live.append(sum(t.numel() for t in tensors()))
            return out

    def tensors() -> list[Tensor]:
        return [o for o in gc.get_objects() if type(o) is Tensor and o.numel() > 500]

    probe = probe_of(Counted(model, *images(64), 4), 4)
    APoZ().collect(probe)
    assert len(live) == 17  # one pass to find the sites, then one for each batch
    assert max(live[9:]) <= max(live[1:5])


@pytest.mark.parametrize("criterion", BOTH)
def test_the_model_is_left_as_it_was(criterion, randomised):
    model = randomised(Styles("in place"))
    before = copy.deepcopy(model.state_dict())
    probe = probe_of(Given(model, *images(), 6), 6)
    model.train()
    criterion.collect(probe)
    assert model.training and not model._forward_hooks and not model.conv1._forward_hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_values_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, -3.0], [2.0, 4.0], [-1.0, 0.0], [-1.0, -2.0]])
    probe = probe_of(Given(model, x, torch.zeros(4).long(), 3), 3)
    assert APoZ().collect(probe)["0 @ 1 relu 1"].tolist() == [0.5, 0.25]  # APoZ .5 and .75
    assert MeanActivation().collect(probe)["0 @ 1 relu 1"].tolist() == [0.75, 1.0]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu6, "hardtanh"),
        (F.gelu, "gelu"),
        (F.silu, "silu"),
        (torch.sigmoid, "sigmoid"),
        (torch.tanh, "tanh"),
        (F.hardswish, "hardswish"),
        (F.hardsigmoid, "hardsigmoid"),
        (F.leaky_relu, "leaky_relu"),
        (F.elu, "elu"),
        (F.selu, "elu"),
        (F.celu, "celu"),
        (F.mish, "mish"),
        (F.softplus, "softplus"),
        (F.rrelu, "rrelu_with_noise"),
        (lambda x: F.threshold(x, 0.1, 0.0), "threshold"),
        (nn.PReLU(6).eval(), "_prelu_kernel"),
        (F.logsigmoid, "log_sigmoid_forward"),
    ],
)
@pytest.mark.parametrize("criterion", BOTH)
def test_every_activation_function_is_a_site(function, name, criterion, randomised):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 6)
            self.function = function  # a part of the model where it has parameters

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.function(self.conv(x))).flatten(1)
            return logits

    model = randomised(Net())
    x, labels = images()
    found = criterion.collect(probe_of(Given(model, x, labels, 6), 6))
    key = f"conv @ function {name} 1" if isinstance(function, nn.Module) else f"conv @ {name} 1"
    assert list(found) == [key]
    with torch.no_grad():
        expected = brute_force(criterion, function(model.conv(x)))
    torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6)


class Bottleneck(nn.Module):
    """The projection has no activation; its sum is read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.expand, self.project = nn.Conv2d(6, 12, 1), nn.Conv2d(12, 6, 1)
        self.last, self.head = nn.Conv2d(6, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        x = x + self.project(F.relu6(self.expand(x)))
        logits: Tensor = self.head(F.relu(self.last(x)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("criterion", BOTH)
def test_without_an_activation_the_consumers_inputs_are_seen(criterion, randomised):
    model = randomised(Bottleneck())
    x, labels = images()
    found = criterion.collect(probe_of(Given(model, x, labels, 6), 6))
    assert set(found) == {
        "stem @ expand convolution 1",
        "stem @ last convolution 1",
        "expand @ hardtanh 1",
        "last @ relu 1",
    }
    with torch.no_grad():
        first = model.bn(model.stem(x))
        second = first + model.project(F.relu6(model.expand(first)))
    for key, value in (("expand", first), ("last", second)):
        expected = brute_force(criterion, value)
        torch.testing.assert_close(
            found[f"stem @ {key} convolution 1"], expected, rtol=1e-5, atol=1e-6
        )


def test_gates_are_no_activations():
    class Excited(nn.Module):
        def __init__(self, written_out: bool) -> None:
            super().__init__()
            self.conv, self.squeeze, self.excite = (
                nn.Conv2d(3, 6, 1),
                nn.Linear(6, 4),
                nn.Linear(4, 6),
            )
            self.head, self.written_out = nn.Conv2d(6, 3, 1), written_out

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = x * (0.5 * (1 + torch.tanh(x))) if self.written_out else F.relu(x)
            scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
            logits: Tensor = self.head(x * scale[:, :, None, None]).mean((2, 3))
            return logits

    x, _ = images()
    assert sites_of(Excited(False), x) == {"conv": ["relu 1"], "squeeze": ["relu 1"]}
    # A GELU or the like that is written out: what its consumers see.
    written = sites_of(Excited(True), x)
    assert written["conv"] == ["squeeze addmm 1", "head convolution 1"]


def test_concatenations_and_shared_layers():
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1)
            self.bn, self.c = nn.BatchNorm2d(11), nn.Conv2d(11, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            b = self.b(F.relu(a))
            return self.c(F.relu(self.bn(torch.cat([a, b], 1)))).mean((2, 3))

    x, _ = images()
    assert sites_of(Dense(), x) == {"a": ["relu 1", "relu 2"], "b": ["relu 1"]}


@pytest.mark.parametrize("options", [{"heads": "whole"}, {"heads": "dim"}, {"form": "graph"}])
def test_structures_of_every_form_have_their_sites(options, randomised):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            logits: Tensor = self.head((x + self.down(F.silu(self.up(x)))).mean(1))
            return logits

    model = randomised(Block())
    x = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(0))
    probe = probe_of(Given(model, x, torch.arange(6) % 3, 4), 4)
    probe = replace(probe, structure=analyze(model, (x,), **options))
    found = scores_of(MeanActivation(), probe)
    assert {"embed", "up"} <= set(found)
    assert all(s.isfinite().all() and s.min() > 0 for s in found.values())
    with torch.no_grad():
        hidden: list[Tensor] = []
        model.up.register_forward_hook(lambda *args: hidden.append(F.silu(args[2])))
        model(x)
    expected = brute_force(MeanActivation(), hidden[0], 2)
    torch.testing.assert_close(found["up"], expected / expected.mean(), rtol=1e-5, atol=1e-6)


def test_a_group_of_one_channel_is_seen():
    """Shuffles and equal halves can tie all of a layer's channels to one."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x))
            for shift in (1, 2, 3):
                x = x + x.roll(shift, 1)
            return self.head(x).mean((2, 3))

    x, labels = images()
    probe = probe_of(Given(Tied(), x, labels, 5), 5)
    assert [g.num_channels for g in probe.structure.groups] == [1]
    found = MeanActivation().collect(probe)
    with torch.no_grad():
        expected = brute_force(MeanActivation(), F.relu(probe.model.conv(x))).mean()
    torch.testing.assert_close(found["conv @ relu 1"], expected.reshape(1))


def test_parts_of_a_group_that_lie_apart(randomised):
    """A pool of the channels of two layers, of which no activation has all."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = F.relu(F.relu(self.a(x)))  # seen twice as often as the other
            logits: Tensor = self.head(torch.cat([first, torch.tanh(self.b(x))], 1))
            return logits

    model = randomised(Parts())
    x = images(size=2)[0].flatten(1)[:, :4]
    structure = analyze(model, (x,))
    member = Member("head.weight", 1, np.arange(12)[:, None], "consumer")
    pool = replace(structure.groups[0], num_channels=12, members=(member,))
    probe = probe_of(Given(model, x, torch.zeros(12).long(), 5), 5)
    found = APoZ().collect(replace(probe, structure=replace(structure, groups=(pool,))))
    with torch.no_grad():
        expected = brute_force(APoZ(), torch.cat([F.relu(model.a(x)), torch.tanh(model.b(x))], 1))
    assert list(found) == ["a @ parts"]
    torch.testing.assert_close(found["a @ parts"], expected)


def test_transformer_layers(randomised):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 16)
            self.layers = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 4, 24, activation="gelu", batch_first=True), 2
            )
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.layers(self.embed(x)).mean(1))
            return logits

    model = randomised(Encoder())
    x = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(0))
    probe = probe_of(Given(model, x, torch.arange(6) % 3, 4), 4)
    found = MeanActivation().collect(probe)
    for name in ("layers.layers.0.linear1", "layers.layers.1.linear1"):
        assert any(key.startswith(f"{name} @ ") and "gelu" in key for key in found)
    hidden = []
    layer = model.layers.layers[0].linear1
    handle = layer.register_forward_hook(lambda *args: hidden.append(F.gelu(args[2])))
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        model(x)
        torch.backends.mha.set_fastpath_enabled(True)
    handle.remove()
    key = next(k for k in found if k.startswith("layers.layers.0.linear1 @ "))
    expected = brute_force(MeanActivation(), hidden[0], 2)
    torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6)
    assert all(s.isfinite().all() for s in scores_of(MeanActivation(), probe).values())


def test_flattened_channels_count_with_all_their_positions(randomised):
    class Flat(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(4 * 36, 6), nn.Linear(6, 3)
            )

    model = randomised(Flat())
    x, labels = images()
    found = APoZ().collect(probe_of(Given(model, x, labels, 6), 6))
    with torch.no_grad():
        expected = brute_force(APoZ(), F.relu(model[0](x)))
    torch.testing.assert_close(found["0 @ 2 relu 1"], expected)


def test_autocast_inside_of_the_task(randomised):
    class Cast(Given):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(model, batch)

    model = randomised(Styles("in place"))
    plain = MeanActivation().collect(probe_of(Given(model, *images(), 6), 6))
    cast = MeanActivation().collect(probe_of(Cast(model, *images(), 6), 6))
    assert set(plain) == set(cast)
    for key, values in plain.items():
        assert not torch.equal(cast[key], values)
        torch.testing.assert_close(cast[key], values, rtol=0.05, atol=0.01)


def test_control_flow_that_depends_on_data_is_an_error():
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.a(x)) if x[0, 0] > 0 else torch.tanh(self.a(x))
            logits: Tensor = self.head(hidden)
            return logits

    x = torch.ones(4, 4)
    x[2:] *= -1
    probe = probe_of(Given(Moody(), x, torch.zeros(4).long(), 2), 2)
    with pytest.raises(StructureError, match=r"aten::tanh where aten::relu stood.*depends on"):
        APoZ().collect(probe)

    class Stopping(Moody):
        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.a(x)
            return self.head(F.relu(hidden)) if x[0, 0] > 0 else hidden[:, :3]

    model = Stopping().eval()
    sites = activation_sites(model, analyze(model, (x[:2],)), model, x[:2])
    with pytest.raises(StructureError, match="ran 1 activations and layers, not 3"):
        with watch(model, sites, lambda *_: None):
            model(x[2:])


def test_loops_of_any_length_and_batches_that_are_dicts(randomised):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.back, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for step in range(x.shape[1]):
                hidden = F.relu(self.cell(x[:, step]))
                x = x + self.back(hidden)[:, None]
            logits: Tensor = self.head(hidden)
            return logits

    class Dicts(Given):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            return model(batch["x"])

    model = randomised(Loop())
    task = Dicts(model, torch.randn(2, 2, 4), torch.zeros(2).long(), 2)
    batches = [{"x": torch.randn(2, steps, 4)} for steps in (2, 3, 2)]
    probe = Probe(
        model, analyze(model, (batches[0]["x"],)), task, torch.device("cpu"), lambda: iter(batches)
    )
    found = APoZ().collect(probe)
    assert {"cell @ relu 1", "cell @ relu 2", "cell @ relu 3"} <= set(found)


def test_a_group_that_was_not_seen_is_an_error():
    model = Styles("functional").eval()
    structure = analyze(model, (images()[0],))
    with pytest.raises(EvaluationError, match="no activations of group 'conv3' were found"):
        APoZ().scores(model, structure, ["conv3"], {"conv1 @ relu 1": torch.ones(6)})


def test_bad_fields():
    with pytest.raises(ConfigError, match=r"APoZ\.batches must be at least 0, got -1"):
        APoZ(batches=-1)
    for pruner in (ActivationAPoZRank, ActivationMeanRank):
        with pytest.raises(ConfigError, match=f"{pruner.__name__}.batches must be at least 0"):
            pruner(batches=-1)
