"""First-order Taylor expansion of the loss: how much it changes if a channel is removed.

Molchanov et al. 2019, arXiv 1906.10771 (Taylor-FO).

Shapes: C channels of a group, P entries that a channel owns in one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raycompress.collect import Probe
from raycompress.criteria.criterion import Criterion, Statistics, channel_rows
from raycompress.errors import ConfigError, TaskError
from raycompress.structure import ChannelGroup, Member

__all__ = ["Taylor"]


@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """Squared first-order change of the loss, averaged over mini-batches.

    A mini-batch's gradient is that of its mean loss, with norms and dropout as in evaluation and
    without autocast. Its square depends on the number of examples, so mini-batches have a size of
    their own: how the job cuts evaluation into batches changes nothing. Their examples are drawn
    in a fixed random order, as in training; each counts by its number of examples.

    Form "gate" (the paper's equation 8 on a gate behind the norm): the gradient of a gate g = 1 on
    the channel is the sum of parameter * gradient over the scale and shift of the norm, and the
    score is its square. Without a norm, the sum goes over the weights and biases that produce the
    channel. Deviation from the paper: where several layers share a channel, the sum goes over all
    of them before it is squared, since removing the channel removes it from all; the paper divides
    by their number, which makes shared channels look less important than they are.

    Form "weight" (equation 5, summed over the filter): the sum of (weight * gradient) ** 2 over all
    weights and biases that produce the channel.

    Both compare across layers as they are, and are 0 for a channel that is zero already.

    Attributes:
        form: "gate" or "weight".
        batch_size: Examples in a mini-batch; 0: the task's batch size.
        batches: Mini-batches of the calibration split that are looked at; 0: all.
    """

    form: Literal["gate", "weight"] = "gate"
    batch_size: int = 0
    batches: int = 0

    needs_data: ClassVar[bool] = True
    passes: ClassVar[float] = 3.0
    normalised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("gate", "weight"):
            raise ConfigError(f"Taylor.form must be 'gate' or 'weight', got {self.form!r}")
        for key in ("batch_size", "batches"):
            if getattr(self, key) < 0:
                raise ConfigError(f"Taylor.{key} must be at least 0, got {getattr(self, key)}")

    def collect(self, probe: Probe) -> dict[str, Tensor]:
        """Scores by group name, shape (C,) each.

        Raises:
            TaskError: The loss isn't a finite scalar.
        """
        parameters = dict(probe.model.named_parameters(remove_duplicate=False))
        members = {g.name: self._members(g, parameters) for g in probe.structure.groups}
        wanted = {m.parameter: parameters[m.parameter] for own in members.values() for m in own}
        sums = {
            g.name: torch.zeros(g.num_channels, dtype=torch.float64) for g in probe.structure.groups
        }
        if not wanted:
            return {}  # nothing can be pruned
        total = 0
        for batch, size in self._mini_batches(probe):
            changes = _changes(probe, batch, wanted)
            total += size
            for name, own in members.items():
                sums[name] += size * self._squared(
                    [channel_rows(changes[m.parameter], m) for m in own]
                )
        return {name: values / total for name, values in sums.items()}

    def group_scores(
        self, model: nn.Module, group: ChannelGroup, statistics: Statistics
    ) -> list[Tensor]:
        """What was collected."""
        return [statistics[group.name]]

    def _members(self, group: ChannelGroup, parameters: dict[str, nn.Parameter]) -> list[Member]:
        own = [m for m in group.members if m.parameter in parameters]
        gates = [m for m in own if m.role == "norm"]
        if self.form == "gate" and gates:
            return gates
        return [m for m in own if m.role == "producer"]

    def _squared(self, changes: Sequence[Tensor]) -> Tensor:
        """From what each entry changes, shapes (C, P), to a score for each channel, shape (C,)."""
        if self.form == "gate":
            return torch.stack([change.sum(dim=1) for change in changes]).sum(dim=0).square()
        return torch.stack([change.square().sum(dim=1) for change in changes]).sum(dim=0)

    def _mini_batches(self, probe: Probe) -> Iterator[tuple[Any, int]]:
        data = probe.task.dataset("calibration")
        size = self.batch_size or probe.task.batch_size
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        if self.batches:
            order = order[: self.batches * size]
        batches = probe.task.batches(data, order, size, probe.device)
        for number, batch in enumerate(batches):
            yield batch, min(size, len(order) - number * size)


def _changes(probe: Probe, batch: Any, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameter times gradient of the batch's loss, in double precision on the CPU.

    `grad` and `requires_grad` of the model stay as they are.
    """
    before = [p.requires_grad for p in parameters.values()]
    # The fused recurrent kernels of GPUs have no backward pass in eval mode.
    recurrent = any(isinstance(m, nn.RNNBase) for m in probe.model.modules())
    plain = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad(), torch.autocast(probe.device.type, enabled=False), plain:
            loss = probe.task.loss(probe.task.forward(probe.model, batch), batch)
            if loss.dim() != 0 or not torch.isfinite(loss.detach()):
                raise TaskError(
                    f"{type(probe.task).__name__}.loss must return a finite scalar, got "
                    f"{loss.detach().tolist()} on calibration data"
                )
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        for parameter, required in zip(parameters.values(), before, strict=True):
            parameter.requires_grad_(required)
    return {
        name: torch.zeros(parameter.shape, dtype=torch.float64)
        if gradient is None
        else parameter.detach().cpu().double() * gradient.cpu().double()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
