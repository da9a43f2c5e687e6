"""Analyses of a model before it is compressed."""

from raycompress.analysis.sensitivity import Sensitivity, write_sensitivity

__all__ = ["Sensitivity", "write_sensitivity"]
