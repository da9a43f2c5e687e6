"""Integer attributes of modules, and which sizes they follow.

An operator may name the attribute that it shows (the groups of a convolution): that follows. Any
other attribute, or entry of a tuple or list, is left as it is until the slim model stops in its
module (`repair.py`): equal numbers may mean different things.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from raycompress.structure.model import AttributeFix
from raycompress.structure.trace import SizeSeen

__all__ = ["Choices", "Place", "integers", "named", "to_fixes"]

Place = tuple[str, str, int | None]  # module, attribute, position where it is a tuple or list
Choices = dict[Place, int]  # which of the sizes seen an attribute follows


def integers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """(attribute, position, value) of the integers that a module holds itself."""
    for name, value in vars(module).items():
        if name.startswith("_"):  # torch's own bookkeeping
            continue
        if type(value) is int:
            yield name, None, value
        elif isinstance(value, (tuple, list)):
            for position, entry in enumerate(value):
                if type(entry) is int:
                    yield name, position, entry


def named(seen: Sequence[SizeSeen], model: nn.Module) -> Choices:
    """Attributes that operators name."""
    modules = dict(model.named_modules())
    return {
        (s.module, s.attribute, None): i
        for i, s in enumerate(seen)
        if s.attribute and getattr(modules[s.module], s.attribute, None) == s.value
    }


def to_fixes(choices: Mapping[Place, int], forms: Sequence[int]) -> tuple[AttributeFix, ...]:
    """The corrections of a structure, for forms of all sizes seen."""
    return tuple(
        AttributeFix(module, attribute, forms[i], position)
        for (module, attribute, position), i in choices.items()
    )
