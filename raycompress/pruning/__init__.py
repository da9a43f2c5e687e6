"""Pruners: frozen dataclasses whose fields are their YAML keys."""

from raycompress.pruning.level import Level
from raycompress.pruning.one_shot import L1Filter, L2Filter, OneShot
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.simulated_annealing import SimulatedAnnealing

__all__ = [
    "L1Filter",
    "L2Filter",
    "Level",
    "OneShot",
    "Problem",
    "Pruner",
    "SimulatedAnnealing",
]
