"""Pruners: frozen dataclasses whose fields are their YAML keys."""

from raycompress.pruning.one_shot import L1Filter, Level
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.simulated_annealing import SimulatedAnnealing

__all__ = ["L1Filter", "Level", "Problem", "Pruner", "SimulatedAnnealing"]
