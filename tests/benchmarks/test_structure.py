"""Speed of analysis and slimming, against Torch-Pruning, and of slim models, against native ones.

`pytest -m benchmark -s tests/benchmarks/test_structure.py`, with requirements-benchmarks.txt.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raycompress.structure import Structure, analyze, slim

sys.path.insert(0, str(Path(__file__).parent.parent / "structure"))
from zoo import need

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]

# Runs in a process of its own, so that the peak of memory is that of one tool: import and build
# everything first, then measure the growth of the peak. Times are the processor's for one thread:
# what a clock shows on an idle machine, and the same on a busy one.
MEASURE = """
import json, resource, sys, time
import torch
sys.path.insert(0, {path!r})
from zoo import need
need("torchvision")
from torchvision.models import resnet50
{imports}
torch.set_num_threads(1)
model = resnet50().eval()
x = torch.zeros(1, 3, 224, 224)
with torch.no_grad():
    model(x)  # what a forward pass itself takes is no tool's doing
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
{first}
middle = time.process_time()
first_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{second}
end = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    small(x)
print(json.dumps(dict(
    first=middle - start, second=end - middle,
    first_mb=(first_peak - base) / 1024, mb=(peak - base) / 1024,
    params=sum(p.numel() for p in small.parameters()),
)))
"""

OURS = {
    "imports": "from raycompress.structure import analyze, slim",
    "first": "structure = analyze(model, x)",
    "second": """
kept = {g.name: range(g.num_channels - g.num_channels // 2) for g in structure.groups}
small = slim(model, structure, kept)
""",
}
# One graph, then the same trailing half of the channels of group after group.
PEER = {
    "imports": "import torch_pruning as tp",
    "first": "graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)",
    "second": """
small = model
for group in list(graph.get_all_groups(ignored_layers=[model.fc])):
    layer, function = group[0].dep.target.module, group[0].dep.handler
    count = graph.get_out_channels(layer)
    graph.get_pruning_group(layer, function, list(range(count - count // 2, count))).prune()
""",
}


def measured(parts: dict[str, str]) -> dict[str, float]:
    code = MEASURE.format(path=str(Path(__file__).parent.parent / "structure"), **parts)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_analysis_and_slimming_of_resnet50() -> None:
    need("torchvision", "torch_pruning")
    runs = [(measured(OURS), measured(PEER)) for _ in range(3)]
    best = [{k: min(run[i][k] for run in runs) for k in runs[0][i]} for i in (0, 1)]
    ours, peer = best
    print("\nResNet-50, 224 px, CPU seconds of one thread, best of 3 processes")
    for name, row in (("raycompress", ours), ("Torch-Pruning", peer)):
        print(
            f"  {name:14} analysis {row['first']:.2f} s, +{row['first_mb']:.0f} MB peak; "
            f"pruning {row['second']:.2f} s; in all +{row['mb']:.0f} MB; "
            f"{row['params'] / 1e6:.2f} M parameters"
        )
    print(
        f"  ratio to Torch-Pruning: analysis {ours['first'] / peer['first']:.2f}, "
        f"pruning {ours['second'] / peer['second']:.2f}"
    )
    assert ours["params"] == peer["params"]  # both did the same
    assert ours["first"] < 2 and ours["first_mb"] < 1000
    assert ours["second"] < 0.5


def interleaved(calls: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """CPU seconds of each call in each round; a change of the machine's speed hits all alike."""
    rounds = []
    for i in range(repeats + 6):
        seconds = [0.0] * len(calls)
        for j in range(len(calls)):
            at = (i + j) % len(calls)  # none always follows the same one
            start = time.process_time()
            calls[at]()
            seconds[at] = time.process_time() - start
        if i >= 6:  # warm
            rounds.append(seconds)
    return rounds


def compare(name: str, dense: nn.Module, small: nn.Module, native: nn.Module, x: Tensor) -> None:
    """A slim model takes the time of the same widths built natively."""
    shapes = [tuple(p.shape) for p in small.parameters()]
    assert shapes == [tuple(p.shape) for p in native.parameters()]
    models = [m.eval() for m in (dense, small, native)]
    with torch.inference_mode():
        rounds = interleaved([lambda m=m: m(x) for m in models], 42)
    whole, ours, built = (1e3 * statistics.median(s) for s in zip(*rounds, strict=True))
    ratio = statistics.median(s / n for _, s, n in rounds)
    print(
        f"\n{name}, batch {len(x)}: dense {whole:.2f} ms, slim {ours:.2f} ms, native "
        f"{built:.2f} ms; slim / native {ratio:.3f}, dense / slim {whole / ours:.2f}"
    )
    assert ratio < 1.1


def convnet(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip([3, *widths], widths, strict=False)):
        layers += [nn.Conv2d(a, b, 3, padding=1, stride=1 + i % 2), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def counts(structure: Structure, fraction: float) -> dict[str, Tensor]:
    """Random channels, not the leading ones."""
    g = torch.Generator().manual_seed(0)
    return {
        group.name: torch.randperm(group.num_channels, generator=g)[
            : round(group.num_channels * fraction)
        ]
        for group in structure.groups
    }


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_slim_convnet_is_as_fast_as_a_native_one() -> None:
    dense = convnet([64, 128, 128, 256])
    x = torch.randn(8, 3, 48, 48)
    structure = analyze(dense, x)
    small = slim(dense, structure, counts(structure, 0.5))
    compare("convnet", dense, small, convnet([32, 64, 64, 128]), x)


def test_a_slim_resnet50_is_as_fast_as_a_native_one() -> None:
    need("torchvision")
    from torchvision.models import resnet50
    from torchvision.models.resnet import Bottleneck, ResNet

    dense = resnet50()
    x = torch.randn(2, 3, 160, 160)
    structure = analyze(dense, x[:1])
    # torchvision's width is that of the blocks' inner convolutions.
    inner = [g.name for g in structure.groups if g.name.endswith(("conv1", "conv2"))]
    inner = [name for name in inner if name.startswith("layer")]
    kept = {k: v for k, v in counts(structure, 0.5).items() if k in inner}
    native = ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=32)
    compare("ResNet-50, inner width 32", dense, slim(dense, structure, kept), native, x)
