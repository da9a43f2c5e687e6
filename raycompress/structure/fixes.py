"""Which integer attributes of modules follow which sizes.

An attribute is corrected only where an operator that the module itself called showed that size.
"""

from __future__ import annotations

import re
from collections import defaultdict

from torch import nn

from raycompress.structure.compile import Sizes
from raycompress.structure.model import AttributeFix
from raycompress.structure.trace import Trace

__all__ = ["attribute_fixes"]

_COUNTS = re.compile(r"head(?!.*(dim|size))|group")
# Numbers that only happen to equal a width: lengths of tables, space and time.
_NEVER = re.compile(
    r"bucket|distance|vocab|position|patch|kernel|window|image|length|layer|depth|max_|num_embed"
)


def attribute_fixes(seen: Trace, sizes: Sizes, model: nn.Module) -> tuple[AttributeFix, ...]:
    """Attribute corrections for all modules of a trace."""
    modules = dict(model.named_modules())
    found: dict[tuple[str, str], int] = {}
    shown: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for s in seen.sizes:
        size = sizes.of(s.shape, s.facets)[s.dim]
        if s.attribute:
            if getattr(modules[s.module], s.attribute, None) == s.value:
                if not sizes.is_constant(size):
                    found[s.module, s.attribute] = size
        else:
            shown[s.module][s.value].add(size)
    for name, values in shown.items():
        for attribute, value in vars(modules[name]).items():
            if type(value) is not int or value not in values or (name, attribute) in found:
                continue
            if _NEVER.search(attribute):
                continue
            changing = [s for s in values[value] if not sizes.is_constant(s)]
            if not changing:
                continue
            constant = len(values[value]) > len(changing)
            # The same number also stands for something that stays: only a name can tell.
            if constant and not _COUNTS.search(attribute):
                continue
            if len(changing) == 1:
                found[name, attribute] = changing[0]
    return tuple(AttributeFix(m, a, s) for (m, a), s in found.items())
