"""Foreign architectures, pruned by half, saved and loaded: the names and texts that they bring."""

import sys
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from raycompress.artifacts import load, save
from raycompress.structure import slim

sys.path.append(str(Path(__file__).parents[1] / "structure"))
from test_zoo_timm import ARCHITECTURES as TIMM
from test_zoo_transformers import ARCHITECTURES as TRANSFORMERS
from zoo import half, need, prepared

pytestmark = [pytest.mark.slow, pytest.mark.zoo]

CHOSEN = {
    **{name: TIMM[name] for name in ("regnety_002", "repvgg_a0", "mobilenetv4_conv_small")},
    **{name: TIMM[name] for name in ("vit_tiny", "beit_base", "res2net50", "convnextv2_atto")},
    **{name: TRANSFORMERS[name] for name in sorted(TRANSFORMERS)[:6]},
}


def tensors(answer):
    return [t for t in tree_leaves(answer) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", CHOSEN)
def test_slim_architectures_are_saved_and_loaded(name, tmp_path):
    if name in TIMM:
        need("timm", "torchvision")
    else:
        need("transformers")
    architecture = CHOSEN[name]
    model, structure, other = prepared(architecture)
    small = slim(model, structure, half(structure)).eval()

    def run(module):
        with torch.no_grad():
            return tensors(module(**other) if isinstance(other, dict) else module(*other))

    expected = run(small)
    assert save(small, tmp_path / "model.pt2", other).dynamic_batch
    for a, b in zip(expected, run(load(tmp_path / "model.pt2")), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6 * float(a.abs().max()))
    if isinstance(small, GraphModule):
        return
    save(small, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", architecture.build()).eval()
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    for a, b in zip(expected, run(loaded), strict=True):
        assert torch.equal(a, b)
