"""A small net whose norms do something, and how tasks call nets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raycompress.testing import ToyNet


def call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def toy_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyNet()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()
