"""A task around any model and tensors, and probes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from raycompress.collect import Probe
from raycompress.criteria import Criterion
from raycompress.structure import analyze
from raycompress.task import ClassificationTask, Split


class Given(ClassificationTask):
    """The model that it is given, on the same examples in every split."""

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> None:
        self.model, self.data = model, TensorDataset(inputs, labels)
        self.batch_size = batch_size

    def build_model(self) -> nn.Module:
        return self.model

    def dataset(self, split: Split) -> TensorDataset:
        return self.data


def probe_of(task: Given, batch_size: int = 8, device: str = "cpu") -> Probe:
    """A probe of the task's model, whose examples come in batches of `batch_size`."""
    structure = analyze(task.model.eval(), task.example_inputs())
    return Probe(
        model=task.model.to(device),
        structure=structure,
        task=task,
        device=torch.device(device),
        batches=lambda: task.batches(task.data, range(len(task.data)), batch_size, device),
    )


def scores_of(criterion: Criterion, probe: Probe) -> dict[str, Tensor]:
    """Scores of all groups."""
    statistics = criterion.collect(probe) if criterion.needs_data else {}
    names = [group.name for group in probe.structure.groups]
    return criterion.scores(probe.model, probe.structure, names, statistics)


@pytest.fixture
def randomised() -> Callable[[Any], Any]:
    """Fills parameters and norm statistics with random numbers, also where zeros and ones were."""

    def fill(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.4, generator=generator)
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0, 0.4, generator=generator)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2, generator=generator)
        return model.eval()

    return fill
