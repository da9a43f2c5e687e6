"""Tuned compression: samples of a space of pruners, proposed by a searcher."""

from raycompress.tuning.entries import SearchSpace
from raycompress.tuning.halving import Halving
from raycompress.tuning.searchers import OBJECTIVES, TPE, Grid, Random, Sample, Searcher
from raycompress.tuning.spaces import Integers, Interval, OneOf, Space, is_space, read_space
from raycompress.tuning.study import Study

__all__ = [
    "OBJECTIVES",
    "TPE",
    "Grid",
    "Halving",
    "Integers",
    "Interval",
    "OneOf",
    "Random",
    "Sample",
    "SearchSpace",
    "Searcher",
    "Space",
    "Study",
    "is_space",
    "read_space",
]
