"""What a removed channel still emits is folded into the bias of the layers that read it.

A mask of a layer's weight alone leaves its bias, and the shift of the norm behind it: the masked
channel is a constant, not zero, and its readers get a constant from it. Without the channel that
constant is lost, and the slim model computes something else (the complaint about NNI's speedup).

Where the lost inputs of a reader add the same number to an output whatever the example and the
position, that number belongs in the reader's bias, and the fold is exact. Zero padding behind a
constant breaks this at the borders; a gate that depends on the input breaks it everywhere. The
inputs' numbers in another order are run too, so that inputs that happen to be alike prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycompress.errors import StructureError
from raycompress.structure.inputs import Inputs, as_call, why_not
from raycompress.structure.model import Kept, Structure
from raycompress.structure.readers import (
    Reader,
    find_readers,
    noise_like,
    run,
    tolerance,
)
from raycompress.structure.slim import slim

__all__ = ["FoldedLayer", "Folding", "fold_constants"]


@dataclass(frozen=True)
class FoldedLayer:
    """What folding did to a layer that reads removed channels.

    Attributes:
        layer: its name.
        inputs: inputs that it loses.
        constant: largest absolute number added to its bias, 0 if nothing was folded.
        error: largest error that the lost inputs leave in its outputs for the inputs given,
            relative to the largest output.
        folded: whether its bias was changed.
        exact: whether the error is rounding alone, for the inputs and for noise.
        added_bias: whether it had no bias and got one: the user's class, built anew, then lacks
            that key.
        reason: why it isn't exact, "" if it is.
    """

    layer: str
    inputs: int
    constant: float
    error: float
    folded: bool
    exact: bool
    added_bias: bool
    reason: str


@dataclass(frozen=True, eq=False)
class Folding:
    """A slim model with constants folded in.

    Attributes:
        model: the slim model.
        layers: the layers that lost inputs, in order of their first call.
        exact: whether it computes what the masked model does, rounding apart.
        reasons: what stands against that.
    """

    model: nn.Module
    layers: tuple[FoldedLayer, ...]
    exact: bool
    reasons: tuple[str, ...]


def fold_constants(
    masked: nn.Module,
    structure: Structure,
    kept: Kept,
    inputs: Inputs,
    *,
    approximate: bool = False,
) -> Folding:
    """The slim model that computes what `masked` does, where biases can make it so.

    Args:
        masked: the dense model as another tool masked it, such as with zeroed weights and biases
            left alone. It is what the result is held against.
        structure: of the dense model.
        kept: group name -> kept channel indices, such as `structure.complete(masks).kept`.
        inputs: an example batch, as for `analyze`.
        approximate: also fold the mean, over the inputs given, of what isn't constant: the usual
            correction of a pruned layer's bias. The error that is left is reported.

    Raises:
        StructureError: `kept` or the model doesn't fit, or the model doesn't run on the inputs.
    """
    small = slim(masked, structure, kept)
    vectors = structure.keep_vectors(kept)
    readers = find_readers(masked, structure, vectors)
    examples = [inputs, *(noise_like(inputs, torch.Generator().manual_seed(s)) for s in (0, 1))]
    for example, kind in zip(examples, ("", "noise like ", "noise like "), strict=True):
        reason = why_not(masked, *as_call(example))
        if reason is not None:
            raise StructureError(reason.replace("the example", f"{kind}the example"))
    run(masked, readers, inputs, Reader.add)
    run(masked, readers, inputs, Reader.compare)
    given = [(r.unfolded / max(r.scale, 1e-30), r.error / max(r.scale, 1e-30)) for r in readers]
    for noise in examples[1:]:
        run(masked, readers, noise, Reader.compare)
    rows = tuple(
        _fold(reader, small, structure, errors, approximate)
        for reader, errors in zip(readers, given, strict=True)
    )
    pruned = {structure.group(name).name for name in kept}
    across = dict.fromkeys(g.reason for g in structure.groups if g.name in pruned and not g.exact)
    reasons = (*across, *(f"{r.layer}: {r.reason}" for r in rows if not r.exact))
    return Folding(small, rows, not reasons, reasons)


def _fold(
    reader: Reader,
    small: nn.Module,
    structure: Structure,
    errors: tuple[float, float],
    approximate: bool,
) -> FoldedLayer:
    """Folds one layer in place; `errors`, relative, are those without and with the fold."""
    limit = tolerance(reader.parameter) * reader.scale
    idle = reader.scale > 0 and reader.unfolded <= limit  # what is lost added nothing
    reason = reader.problem if reader.scale > 0 else "it returned nothing to compare"
    exact = idle or (not reason and reader.error <= limit)
    fold = not idle and not reason and (exact or approximate)
    constant, added = torch.zeros(1), False
    if fold:
        constant = reader.constant
        if reader.outputs is not None:
            constant = constant[reader.outputs.to(constant.device)]
        reason, added = _add(reader, small, structure, constant)
        fold = not reason
        exact &= fold
    return FoldedLayer(
        layer=reader.name or "(model)",
        inputs=reader.inputs,
        constant=float(constant.abs().max()) if fold else 0.0,
        error=errors[fold],
        folded=fold,
        exact=exact,
        added_bias=added,
        reason="" if exact else reason or _why(reader),
    )


def _add(
    reader: Reader, small: nn.Module, structure: Structure, constant: Tensor
) -> tuple[str, bool]:
    """Adds to the slim layer's bias: why it can't, and whether a bias was made."""
    if reader.module.bias is None:
        module = dict(small.named_modules()).get(reader.name)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            return "it has no bias, and graph form takes none", False
        module.bias = nn.Parameter(constant.to(module.weight))
        return "", True
    leaf = structure.leaves.get(f"{reader.name}.bias".removeprefix("."))
    if leaf is None or leaf.aliases:
        return "its bias is shared with another layer", False
    bias = small.get_parameter(leaf.name)
    bias.data = bias.data + constant.to(bias)
    return "", False


def _why(reader: Reader) -> str:
    module = reader.module
    if not reader.steady:
        return "what it loses isn't constant over examples and positions"
    if isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode == "zeros":
        padding = module.padding
        if padding == "same" or (isinstance(padding, tuple) and any(padding)):
            return "zero padding: at the borders it reads less of the constant"
    return "what the constant adds to its outputs depends on the position"
