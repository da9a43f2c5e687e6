"""Any number of channels of each group may go, not only half: random ratios for each group."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
from architectures import EXACT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import masked, need, prepared, randomise

from raycompress.structure import Structure, analyze, slim, verify


class AcrossChannels(nn.Module):
    """Norms across channels, so that slim can't equal masked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 2, 2)
        self.group, self.layer, self.rms = nn.GroupNorm(1, 12), nn.LayerNorm(12), nn.RMSNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.embed(x)).flatten(2).transpose(1, 2)
        x = x + self.down(self.up(self.layer(x)).softmax(-1))
        return self.head(self.rms(x).mean(1))


class EmbedSized(nn.Module):
    """Heads are reshaped to the width of the input, which must then go with them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.num_heads = nn.Conv2d(3, 24, 2, 2), 4
        self.qkv, self.proj, self.head = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.head(self.proj((attention @ v).transpose(1, 2).reshape(b, n, c)).mean(1))


LOCAL = [*EXACT, AcrossChannels, EmbedSized]
ZOO = {
    "torchvision": ("resnet18", "shufflenet_v2", "regnet_y_400mf", "swin_t"),
    "timm": ("res2net50", "vit_tiny", "levit_128s", "poolformer_s12"),
    "transformers": ("bert", "llama", "t5"),
}


def compare(model: nn.Module, structure: Structure, other: Any, data: st.DataObject) -> None:
    groups = len(structure.groups)
    ratios = data.draw(st.lists(st.floats(0, 1), min_size=groups, max_size=groups))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    kept = {}
    for group, ratio in zip(structure.groups, ratios, strict=True):
        count = group.round_up(1 + round(ratio * (group.num_channels - 1)))
        kept[group.name] = torch.randperm(group.num_channels, generator=generator)[:count]
    dense = masked(model, structure.masks(kept))
    small = slim(model, structure, kept)
    verdict = verify(dense, small, other, structure=structure, kept=kept)
    assert verdict.kind in ("exact", "inexact"), verdict
    assert structure.cost({k: len(v) for k, v in kept.items()}).params == sum(
        p.numel() for p in small.parameters()
    )


@functools.cache
def local(build: type[nn.Module]) -> tuple[nn.Module, Structure]:
    torch.manual_seed(0)
    model = build()
    randomise(model)
    model = model.double().eval()
    return model, analyze(model, torch.rand(2, 3, 8, 8).double())


@pytest.mark.parametrize("build", LOCAL, ids=lambda c: c.__name__)
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_share_of_each_group(build: type[nn.Module], data: st.DataObject) -> None:
    model, structure = local(build)
    compare(model, structure, (torch.rand(3, 3, 8, 8).double(),), data)


@functools.cache
def foreign(package: str, name: str) -> tuple[nn.Module, Structure, Any]:
    return prepared(importlib.import_module(f"test_zoo_{package}").ARCHITECTURES[name])


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize(("package", "name"), [(p, n) for p, names in ZOO.items() for n in names])
@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_share_of_each_group_of_the_zoo(package: str, name: str, data: st.DataObject) -> None:
    need(package, "torchvision")
    model, structure, other = foreign(package, name)
    compare(model, structure, other, data)
