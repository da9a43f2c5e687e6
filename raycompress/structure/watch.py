"""Shows a model's activations while it runs, at the sites that `activation_sites` found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raycompress.errors import StructureError
from raycompress.structure.activations import WATCHED, Site, Sites, operator_name, output_of
from raycompress.structure.quiet import quiet

__all__ = ["watch"]


@contextmanager
def watch(model: nn.Module, sites: Sites, see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Shows the tensors at the sites to `see` while the model runs once, in eval mode.

    Raises:
        StructureError: the pass runs other operators than the one in which the sites were found.
    """
    mode = _Watch(sites, see)
    with quiet(model), mode:
        yield
    if mode.count != len(sites.operators):
        raise StructureError(
            f"the model ran {mode.count} activations and layers, not {len(sites.operators)} as "
            "before on inputs of the same shapes: what it runs depends on its input's values"
        )


class _Watch(TorchDispatchMode):
    def __init__(self, sites: Sites, see: Callable[[Site, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sites = sites
        self.see = see
        self.count = 0
        self.at: dict[int, list[Site]] = defaultdict(list)
        for site in sites.found:
            self.at[site.ordinal].append(site)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = operator_name(func)
        out = func(*args, **(kwargs or {}))
        if name not in WATCHED:
            return out
        ordinal = self.count
        self.count += 1
        known = self.sites.operators
        if ordinal >= len(known) or known[ordinal] != name:
            before = f"{known[ordinal]} stood" if ordinal < len(known) else "no operator was left"
            raise StructureError(
                f"the model runs {name} where {before} before on inputs of the same shapes: what "
                "it runs depends on its input's values"
            )
        for site in self.at.get(ordinal, ()):
            tensor = output_of(out)
            if site.operand:
                tensor = _argument(func, args, kwargs or {}, site.operand)
            if tensor.dim() <= site.dim or tensor.shape[site.dim] != site.size:
                raise StructureError(
                    f"{site.name} of group {site.group!r} gave {site.size} channels along dim "
                    f"{site.dim} before, and now has the shape {tuple(tensor.shape)}"
                )
            self.see(site, tensor)
        return out


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    place = next(i for i, a in enumerate(func._schema.arguments) if a.name == name)
    return args[place] if place < len(args) else kwargs[name]
