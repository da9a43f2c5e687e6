"""Criteria: how much each channel or weight matters; higher = keep."""

from raycompress.criteria.criterion import Criterion, rank
from raycompress.criteria.magnitude import L1, L2, Magnitude

__all__ = ["CRITERIA", "L1", "L2", "Criterion", "Magnitude", "rank"]

CRITERIA: dict[str, type[Criterion]] = {"level": Magnitude, "l1": L1, "l2": L2}
"""Criteria by the names that jobs use."""
