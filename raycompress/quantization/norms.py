"""Which BatchNorm stands right behind which layer, seen in one forward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from raycompress.errors import StructureError
from raycompress.quantization.layers import QUANTIZED, QuantizedLayer

__all__ = ["norms_behind"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Watch(TorchFunctionMode):
    """Counts what is done with layers' outputs, and which norm does it."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor too: its id stays its own
        self.norm = ""
        self.uses: dict[str, set[str]] = {}
        self.calls: dict[str, int] = {}

    def used(self, values: Any) -> None:
        """Notes uses of layers' outputs among values, by the norm that runs now or by "other"."""
        for leaf in tree_leaves(values):
            if id(leaf) in self.outputs:
                self.uses.setdefault(self.outputs[id(leaf)][0], set()).add(self.norm)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.used([args, kwargs])
        return func(*args, **(kwargs or {}))


def norms_behind(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, str]:
    """BatchNorms that alone read what a layer returns, by the layer's name.

    Layers and norms that run more than once, norms without running statistics, and layers whose
    outputs anything else reads are left out.

    Args:
        model: On the CPU; only read.
        example_inputs: Positional arguments.

    Raises:
        StructureError: The model can't run on them.
    """
    model = copy.deepcopy(model).eval()
    watch = _Watch()

    def layer_hook(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            watch.calls[name] = watch.calls.get(name, 0) + 1
            if isinstance(output, Tensor):
                watch.outputs[id(output)] = (name, output)

        return hook

    def norm_hooks(name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any) -> None:
            watch.calls[name] = watch.calls.get(name, 0) + 1
            watch.norm = name

        def after(module: nn.Module, args: Any, output: Any) -> None:
            watch.norm = ""

        return before, after

    for name, module in model.named_modules():
        if type(module) in QUANTIZED or isinstance(module, QuantizedLayer):
            module.register_forward_hook(layer_hook(name))
        elif isinstance(module, _NORMS) and module.running_var is not None:
            before, after = norm_hooks(name)
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    try:
        with torch.no_grad(), watch:
            result = model(*example_inputs)
    except Exception as error:  # the model's own, whatever it is
        raise StructureError(
            f"the model doesn't run on the example inputs: {type(error).__name__}: {error}"
        ) from error
    watch.used(result)
    found = {}
    for layer, norms in watch.uses.items():
        norm = next(iter(norms))
        if norm and len(norms) == 1 and watch.calls[layer] == watch.calls[norm] == 1:
            found[layer] = norm
    return found
