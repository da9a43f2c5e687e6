"""Pruners: frozen dataclasses whose fields are their YAML keys."""

from raycompress.pruning.admm import ADMM
from raycompress.pruning.agp import AGP
from raycompress.pruning.auto_compress import AutoCompress
from raycompress.pruning.controls import FromScratch, RandomFilter
from raycompress.pruning.curve_solver import CurveSolver
from raycompress.pruning.filters import ActivationAPoZRank, ActivationMeanRank, TaylorFO
from raycompress.pruning.fine_grained import LAMP, FineGrained, Level, Wanda
from raycompress.pruning.fixed_allocation import FixedAllocation
from raycompress.pruning.fpgm import FPGM
from raycompress.pruning.iterative import Iterative
from raycompress.pruning.lottery_ticket import LotteryTicket
from raycompress.pruning.mixed_precision import MixedPrecision
from raycompress.pruning.movement import MovementPruning
from raycompress.pruning.net_adapt import NetAdapt
from raycompress.pruning.nni_annealing import NNISimulatedAnnealing
from raycompress.pruning.one_shot import L1Filter, L2Filter, OneShot
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.simulated_annealing import SimulatedAnnealing
from raycompress.pruning.slim import Slim
from raycompress.pruning.soft import SoftFilter

__all__ = [
    "ADMM",
    "AGP",
    "FPGM",
    "LAMP",
    "ActivationAPoZRank",
    "ActivationMeanRank",
    "AutoCompress",
    "CurveSolver",
    "FineGrained",
    "FixedAllocation",
    "FromScratch",
    "Iterative",
    "L1Filter",
    "L2Filter",
    "Level",
    "LotteryTicket",
    "MixedPrecision",
    "MovementPruning",
    "NNISimulatedAnnealing",
    "NetAdapt",
    "OneShot",
    "Problem",
    "Pruner",
    "RandomFilter",
    "SimulatedAnnealing",
    "Slim",
    "SoftFilter",
    "TaylorFO",
    "Wanda",
]
