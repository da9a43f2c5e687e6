"""The rule for each kind of ATen operator, and the public hook that adds one.

A rule reads the facets of the inputs and gives the outputs theirs. Data movement is executed on
the labels; elementwise operators merge; contractions merge in the joint index space.
"""

from __future__ import annotations

from typing import Any

import torch

from raycompress.structure.rules.contraction import CONTRACTIONS
from raycompress.structure.rules.convolution import CONVOLUTIONS
from raycompress.structure.rules.elementwise import ELEMENTWISE, elementwise
from raycompress.structure.rules.indexing import INDEXINGS
from raycompress.structure.rules.joining import JOININGS
from raycompress.structure.rules.movement import MOVEMENTS
from raycompress.structure.rules.norm import NORMS
from raycompress.structure.rules.reduction import REDUCTIONS
from raycompress.structure.rules.spatial import SPATIAL
from raycompress.structure.trace import Rule

__all__ = ["find_rule", "register_operator"]

_RULES: dict[str, Rule] = {
    **ELEMENTWISE,
    **MOVEMENTS,
    **JOININGS,
    **INDEXINGS,
    **REDUCTIONS,
    **CONTRACTIONS,
    **CONVOLUTIONS,
    **NORMS,
    **SPATIAL,
}


def register_operator(name: str, rule: Rule) -> None:
    """Adds or replaces the rule of an operator, for all analyses of this process.

    Args:
        name: qualified name without overload and without the trailing underscore of in-place
            variants, such as "mylib::fused_gate".
        rule: called after the operator ran, with a `Call`.

    Example:
        >>> from raycompress.structure import elementwise, register_operator
        >>> register_operator("mylib::fused_gate", elementwise)
    """
    _RULES[name] = rule


def find_rule(func: Any) -> Rule | None:
    """The rule of an operator overload, or None."""
    name = func._schema.name
    rule = _RULES.get(name)
    if rule is None and name.endswith("_"):
        rule = _RULES.get(name[:-1])
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = elementwise
    return rule
