"""Int8 against float on the same runtime: `OMP_NUM_THREADS=1 pytest -m benchmark -s` this file.

A VGG of 64 to 256 channels at 32x32, its weights as they were made: times don't depend on them. All
models are timed in turns, in one run. For a quiet machine; what other processes take is part of the
medians, so the fastest passes are what is compared.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raycompress.quantization import QAT
from raycompress.quantization.lowering import lowering
from raycompress.structure import measure

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def _vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 128, 256):
        for inputs in (channels, width):
            conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 4 * 4, 10)).eval()


def test_integers_are_faster_than_floats_of_the_same_runtime(tmp_path):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, x = _vgg(), torch.randn(64, 3, 32, 32)
    quantized, quantizer = _vgg(), QAT()
    quantized.load_state_dict(model.state_dict())
    quantizer.prepare(quantized, quantizer.choose(quantized))
    quantizer.calibrate(quantized, lambda m, batch: m(batch), [x])
    quantized.eval()
    models, files = {"eager float": model}, {}
    for backend in ("onnx", "inductor"):
        folder = tmp_path / backend
        folder.mkdir()
        lowered = lowering(backend)(quantized, model, (x[:2],), folder, lambda m: m(x), None)
        assert len(lowered.layers_integer) == 7
        models |= {f"{backend} int8": lowered.model, f"{backend} float": lowered.reference}
        files[backend] = lowered.file_bytes / lowered.reference_bytes
    try:
        rows = [
            *measure(models, (x[:1],), batch_sizes=(1,), repeats=100, device="cpu"),
            *measure(models, (x,), batch_sizes=(64,), repeats=15, device="cpu"),
        ]
    finally:
        torch.set_num_threads(threads)
    best = {(row.name, row.batch_size): row.min_ms for row in rows}
    for row in rows:
        print(
            f"\n{row.name:>14}, batch {row.batch_size:2}: fastest {row.min_ms:7.2f} ms, median "
            f"{row.median_ms:7.2f} ms",
            end="",
        )
    for backend, ratio in files.items():
        speedups = {
            size: best[f"{backend} float", size] / best[f"{backend} int8", size] for size in (1, 64)
        }
        shown = ", ".join(f"{value:.2f}x at batch {size}" for size, value in speedups.items())
        print(f"\n{backend}: int8 is faster {shown}; its file is {ratio:.3f} of the float one's")
        assert ratio <= 0.3
        assert all(value >= 1.5 for value in speedups.values())
