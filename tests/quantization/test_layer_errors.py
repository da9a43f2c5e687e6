"""The table of what rounding does to each layer."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_nets import call

from raycompress.quantization import BNN, LSQ, PTQ, QAT, Bits, DoReFa, NaiveQuantizer, Quantizer
from raycompress.quantization.layer_errors import LayerError, layer_errors
from raycompress.quantization.layers import quantized_layers
from raycompress.testing import ToyNet
from raycompress.tracking.figures import quantization_figure


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 2, 6, 6, generator=generator) for _ in range(2)]


def toy_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ToyNet().eval()


def table(quantizer: Quantizer, model: nn.Module) -> tuple[LayerError, ...]:
    quantizer.prepare(model, quantizer.choose(model))
    quantizer.calibrate(model, call, batches())
    return layer_errors(model.eval(), call, batches())


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)).eval()
    model[0].weight.data = torch.tensor([[3.0, 1.2]])  # becomes (3, 1) with S = 1
    model[1].weight.data = torch.tensor([[2.0]])  # stays
    quantizer = PTQ(observer="minmax")
    quantizer.prepare(model, {"0": Bits(weight=3, input=2), "1": Bits(weight=3)})
    x = torch.tensor([[3.0, 0.8], [0.0, 1.0]])  # S = 1: becomes (3, 1), (0, 1)
    quantizer.calibrate(model, call, [x])
    first, second = layer_errors(model, call, [x])

    def decibels(signal: float, noise: float) -> Any:
        return pytest.approx(10 * math.log10(signal / noise), rel=1e-5)

    assert (first.layer, first.type, first.weight_bits, first.input_bits) == ("0", "Linear", 3, 2)
    assert (first.weight_low, first.weight_high) == (pytest.approx(1.2), 3)
    assert (first.input_low, first.input_high) == (0, 3)
    assert first.weight_sqnr == decibels(9 + 1.44, 0.04)
    assert first.input_sqnr == decibels(9 + 0.64 + 1, 0.04)
    # 9.96 became 10, 1.2 became 1.
    assert (first.output_low, first.output_high) == (pytest.approx(1.2), pytest.approx(9.96))
    assert first.output_sqnr == decibels(9.96**2 + 1.2**2, 0.04**2 + 0.2**2)
    assert first.chain_sqnr == first.output_sqnr
    # The second layer rounds nothing, and gets the first one's error.
    assert second.weight_sqnr == second.output_sqnr == math.inf
    assert second.input_sqnr is None and second.input_bits is None
    assert second.chain_sqnr == pytest.approx(first.chain_sqnr, rel=1e-5)


def test_a_bit_more_is_about_six_decibels() -> None:
    values = []
    for bits in (5, 6, 7, 8):
        rows = table(PTQ(weight_bits=bits, input_bits=bits, observer="minmax"), toy_net())
        values.append(rows[0].output_sqnr)
    steps = [b - a for a, b in pairwise(values)]
    assert all(4.5 < step < 7.5 for step in steps)


def test_norms_are_folded_into_the_weight_that_is_compared() -> None:
    model = toy_net()
    model.bn1.weight.data = torch.linspace(0.01, 100, len(model.bn1.weight))
    quantizer = PTQ()
    quantizer.prepare(model, {"conv1": Bits(weight=8, norm="bn1")})
    quantizer.calibrate(model, call, batches())
    folded = model.conv1.weight * model.conv1.weight_quantizer.factor(model.conv1.weight)
    row = layer_errors(model, call, batches())[0]
    assert row.weight_high == float(folded.detach().max()) and row.weight_high > 1


@pytest.mark.parametrize("quantizer", [BNN(), DoReFa(gradient_bits=6), LSQ(), NaiveQuantizer()])
def test_every_quantizer_has_rows_and_a_figure(quantizer: Quantizer) -> None:
    model = toy_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = table(quantizer, model)
    assert [row.layer for row in rows] == list(quantized_layers(model))
    assert all(row.weight_sqnr is not None and row.output_bits is None for row in rows)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
    figure = quantization_figure(rows)
    assert len(figure.axes[0].get_yticklabels()) == len(rows)
    assert {line.get_label() for line in figure.axes[0].lines} >= {"weight"}


def test_a_layer_that_is_never_called_has_no_activations() -> None:
    model = nn.Sequential(nn.Linear(72, 3), nn.Linear(3, 3)).eval()
    quantizer = QAT()
    quantizer.prepare(model, quantizer.choose(model))

    def forward(model: Any, batch: Tensor) -> Any:
        return model[0](batch.flatten(1))

    quantizer.calibrate(model, forward, batches())
    first, second = layer_errors(model, forward, batches())
    assert first.chain_sqnr is not None and first.chain_sqnr > 20
    assert second.input_low is second.output_sqnr is second.chain_sqnr is None
    assert second.weight_sqnr is not None
    quantization_figure([first, second])
