"""Criteria: how much each channel or weight matters; higher = keep."""

from raycompress.criteria.activation import ActivationCriterion, APoZ, MeanActivation
from raycompress.criteria.bn_scale import BNScale
from raycompress.criteria.criterion import Criterion, channel_rows, parameter_name
from raycompress.criteria.fpgm import GeometricMedian
from raycompress.criteria.lamp import LAMP
from raycompress.criteria.magnitude import L1, L2, Magnitude
from raycompress.criteria.obs import OBS
from raycompress.criteria.random import Random
from raycompress.criteria.taylor import Taylor
from raycompress.criteria.wanda import Wanda
from raycompress.errors import ConfigError
from raycompress.importing import resolve
from raycompress.wording import near

__all__ = [
    "CRITERIA",
    "L1",
    "L2",
    "LAMP",
    "OBS",
    "APoZ",
    "ActivationCriterion",
    "BNScale",
    "Criterion",
    "GeometricMedian",
    "Magnitude",
    "MeanActivation",
    "Random",
    "Taylor",
    "Wanda",
    "channel_rows",
    "criterion",
    "parameter_name",
]

CRITERIA: dict[str, Criterion] = {
    "level": Magnitude(),
    "l1": L1(),
    "l2": L2(),
    "fpgm": GeometricMedian(),
    "apoz": APoZ(),
    "mean_activation": MeanActivation(),
    "taylor": Taylor(),
    "taylor_weight": Taylor(form="weight"),
    "obs": OBS(),
    "bn_scale": BNScale(),
    "lamp": LAMP(),
    "wanda": Wanda(),
    "random": Random(),
}
"""Criteria by the names that jobs use."""


def criterion(name: str, key: str, kind: str | None = None) -> Criterion:
    """A criterion by its name, or a user's own by import path "package.module:Class".

    Args:
        name: As a job or a pruner's field gives it.
        key: Of the job, for messages.
        kind: Only criteria of this kind, "channels" or "weights", will do; None: any.

    Raises:
        ConfigError: There is none of that name or kind.
    """
    known = [n for n, c in CRITERIA.items() if kind is None or c.kind == kind]
    if ":" in name:
        found: Criterion = resolve(name, Criterion, key)()
    elif name in CRITERIA:
        found = CRITERIA[name]
    else:
        allowed = f"; allowed: {', '.join(known)}, or package.module:Class"
        raise ConfigError(f"{key}: no criterion {name!r}{near(name, known)}{allowed}")
    if kind is not None and found.kind != kind:
        raise ConfigError(
            f"{key}: {name!r} scores {found.kind}, and {kind} are pruned here; "
            f"allowed: {', '.join(known)}, or package.module:Class"
        )
    return found
