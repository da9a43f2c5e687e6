"""Scores of channels by Optimal Brain Surgeon: see `surgeon.py` for the mathematics.

Shapes: C channels of a group, B inputs of a layer for each channel, I inputs of a layer times
kernel places (and 1 for a bias), O outputs, R rows (examples times positions).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from raycompress.collect import Probe
from raycompress.criteria.activation import ActivationCriterion
from raycompress.criteria.criterion import Criterion, Statistics
from raycompress.criteria.surgeon import Reader, removal_order
from raycompress.errors import ConfigError, EvaluationError
from raycompress.layer_rows import unfit, windows
from raycompress.structure import ChannelGroup, Structure

__all__ = ["OBS"]

MAX_COLUMNS = 8192
"""Inputs whose correlations are held as one matrix: 512 MiB. More are taken place by place."""
MAX_ENTRIES = 1 << 27
"""Entries of such matrices summed in one pass over the data, 1 GiB; more take more passes."""
MAX_POSITIONS = 16
"""Positions taken of each example: neighbours say much the same."""


@dataclass(frozen=True, kw_only=True)
class OBS(Criterion):
    """Squared error of the layers that read a group's channels, once a channel has gone.

    Channels go one by one, the cheapest first, and the score is what all that went until then
    cost together, as a fraction of the squared answers of the layers that read them; several
    layers add up. It rises strictly in the order of removal, so that keeping the k highest scores
    keeps what the surgeon keeps, for any k. Inputs that are always zero cost nothing.

    Read by: Linear and convolutions without groups, however often they are called. Their outputs
    all count, also those that go with the channel in a layer that reads and writes the same group.
    Other layers that read the group (recurrent ones, attention's own projections, transposed or
    grouped convolutions) have no say; where there are no others, the group is ranked by the squares
    of its activations, and scored by the share of them that has gone.

    Above `MAX_COLUMNS` inputs a layer's correlations are left out between the places of a kernel,
    or between the columns of a channel; what has more channels is refused. Time grows with C *
    I ** 2, and with R * I ** 2.

    Deviation from the papers: sums aren't averaged over rows and have no factor 2, which changes
    no order.

    Attributes:
        damping: Ridge on the change of the weights, as a fraction of the mean of X^T X's diagonal.
        batches: Calibration batches looked at; 0: all.
    """

    damping: float = 0.01
    batches: int = 0

    needs_data: ClassVar[bool] = True
    normalised: ClassVar[bool] = False
    cumulative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < math.inf:
            raise ConfigError(f"OBS.damping must be above 0, got {self.damping}")
        if self.batches < 0:
            raise ConfigError(f"OBS.batches must be at least 0, got {self.batches}")

    def check(self, model: nn.Module, structure: Structure, names: Sequence[str]) -> None:
        """Refuses groups of more channels than fit into a matrix."""
        for name in names:
            count = structure.group(name).num_channels
            if count > MAX_COLUMNS:
                raise ConfigError(
                    f"group {name!r} has {count} channels, and 'obs' compares at most "
                    f"{MAX_COLUMNS}: exclude it in targets, or take another criterion"
                )

    def collect(self, probe: Probe) -> dict[str, Tensor]:
        """Scores by group name, shape (C,) each; the matrices stay here.

        Raises:
            EvaluationError: A layer's inputs aren't finite, or rounding made a matrix singular.
        """
        model, groups = probe.model, probe.structure.groups
        scores: dict[str, Tensor] = {}
        for part in _parts(model, [g for g in groups if g.num_channels <= MAX_COLUMNS]):
            self._look(probe, [sums for own in part.values() for sums in own])
            for name in list(part):
                own = part.pop(name)  # matrices go as soon as they were used
                readers = [reader for sums in own if sums.seen for reader in sums.readers()]
                if not all(math.isfinite(reader.square) for reader in readers):
                    raise EvaluationError(f"what reads group {name!r} doesn't get finite inputs")
                if readers:
                    scores[name] = _strict(*removal_order(readers, self.damping))
                del readers, own
        if any(group.name not in scores for group in groups):
            energy = _Energy(batches=self.batches)
            found = energy.collect(probe)
            for group in groups:
                sites = [v for key, v in found.items() if key.startswith(f"{group.name} @ ")]
                if group.name not in scores and sites:
                    values = torch.stack(sites).mean(dim=0)
                    order = torch.argsort(values, stable=True)
                    costs = values[order] / values.sum().clamp_min(1e-300)
                    scores[group.name] = _strict(order, costs)
        return scores

    def group_scores(
        self, model: nn.Module, group: ChannelGroup, statistics: Statistics
    ) -> list[Tensor]:
        """What was collected.

        Raises:
            EvaluationError: Neither a layer that reads the group nor an activation of it was seen.
        """
        if group.name not in statistics:
            raise EvaluationError(
                f"group {group.name!r}: no layer that reads its channels, nor an activation of "
                "it, was seen on calibration data: exclude it in targets, or take another criterion"
            )
        return [statistics[group.name]]

    def _look(self, probe: Probe, layers: Sequence[_Sums]) -> None:
        with ExitStack() as hooks, torch.no_grad():
            for sums in layers:
                hook = sums.module.register_forward_pre_hook(sums.add, with_kwargs=True)
                hooks.callback(hook.remove)
            for batch in islice(probe.batches(), self.batches or None):
                for sums in layers:
                    sums.call = 0
                probe.task.forward(probe.model, batch)


class _Energy(ActivationCriterion):
    """Mean square of a channel's activations."""

    def summed(self, activations: Tensor, dims: list[int]) -> Tensor:
        return activations.double().square().sum(dims)


@dataclass(eq=False)
class _Sums:
    """X^T X and ||XW||^2 of one layer, summed over batches and calls, for one group.

    Attributes:
        module: The layer.
        matrix: Its weights, and its bias as the last row: shape (I, O), double.
        blocks: Columns of X that each channel owns, shape (C, B).
        split: Whether each place has a matrix of its own, of the channels' columns there.
    """

    module: nn.Module
    matrix: Tensor
    blocks: Tensor
    split: bool
    grams: list[Tensor] = field(default_factory=list)
    square: float = 0.0
    seen: bool = False
    call: int = 0
    _positions: dict[int, np.random.Generator] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Of the matrices."""
        channels, places = self.blocks.shape
        return places * channels**2 if self.split else len(self.matrix) ** 2

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the layer's forward."""
        rows = self._rows(args[0] if args else kwargs["input"]).double()
        if module.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.square += float((rows @ self.matrix).square().sum())
        for at, columns in enumerate(self._columns()):
            some = rows if columns is None else rows[:, columns.to(rows.device)]
            if not self.seen:
                self.grams.append(some.T @ some)
            else:
                self.grams[at].addmm_(some.T, some)
        self.seen = True

    def readers(self) -> Iterator[Reader]:
        """One for each matrix."""
        matrix = self.matrix
        for gram, columns in zip(self.grams, self._columns(), strict=True):
            if columns is None:
                yield Reader(gram, matrix, self.blocks, self.square)
            else:
                here = torch.arange(len(self.blocks))[:, None]
                yield Reader(gram, matrix[columns.to(matrix.device)], here, self.square)

    def _columns(self) -> Iterator[Tensor | None]:
        """Of X, those of each matrix; None: all."""
        if not self.split:
            yield None
            return
        bias = [] if self.module.bias is None else [len(self.matrix) - 1]
        for place in self.blocks.unbind(dim=1):
            yield torch.cat([place, torch.tensor(bias, dtype=torch.int64)])

    def _rows(self, x: Tensor) -> Tensor:
        """What the layer multiplies by its weights, at some positions of each example: (R, I).

        Which ones depends on the example's number and the call alone, not on the batch.
        """
        call, self.call = self.call, self.call + 1
        seen = windows(self.module, x.detach())
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        num, *positions = seen.shape[: seen.dim() - weight.dim() + 1] or (1,)
        size = math.prod(positions)
        if size > MAX_POSITIONS:
            generator = self._positions.setdefault(call, np.random.default_rng(call))
            chosen = np.argpartition(generator.random((num, size)), MAX_POSITIONS)
            chosen = chosen[:, :MAX_POSITIONS].ravel()
            where = np.arange(num).repeat(MAX_POSITIONS), *np.unravel_index(chosen, positions)
            seen = seen[tuple(torch.from_numpy(index).to(x.device) for index in where)]
        return seen.reshape(-1, weight[0].numel())


def _parts(model: nn.Module, groups: Sequence[ChannelGroup]) -> Iterator[dict[str, list[_Sums]]]:
    """Groups with the layers that read them, as many at a time as a pass has room for."""
    part: dict[str, list[_Sums]] = {}
    room = MAX_ENTRIES
    for group in groups:
        own = _layers(model, group)
        needed = sum(sums.entries for sums in own)
        if part and needed > room:
            yield part
            part, room = {}, MAX_ENTRIES
        if own:
            part[group.name] = own
            room -= needed
    if part:
        yield part


def _layers(model: nn.Module, group: ChannelGroup) -> list[_Sums]:
    """Layers that read a group's channels."""
    modules = dict(model.named_modules())
    owned: dict[str, list[Tensor]] = {}
    for member in group.members:
        layer, _, parameter = member.parameter.rpartition(".")
        if member.role == "consumer" and member.dim == 1 and parameter == "weight":
            owned.setdefault(layer, []).append(torch.from_numpy(member.indices))
    found = []
    for layer, indices in owned.items():
        module = modules[layer]
        if unfit(module):
            continue
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        matrix = weight.detach().double().flatten(1).T
        if isinstance(bias, Tensor):
            matrix = torch.cat([matrix, bias.detach().double()[None]])
        places = weight[0, 0].numel()
        channels = torch.cat(indices, dim=1)
        blocks = (channels[:, :, None] * places + torch.arange(places)).flatten(1)
        found.append(_Sums(module, matrix, blocks, split=len(matrix) > MAX_COLUMNS))
    return found


def _strict(order: Tensor, costs: Tensor) -> Tensor:
    """Costs added up in the order of removal, each sum above the one before: shape (C,)."""
    scores = torch.zeros(len(order), dtype=torch.float64)
    total, last = 0.0, -1.0
    for channel, cost in zip(order.tolist(), costs.tolist(), strict=True):
        total += cost
        last = max(total, math.nextafter(last, math.inf))
        scores[channel] = last
    return scores
