"""Network Slimming (Liu et al. 2017, arXiv 1708.06519): one threshold on all norms' factors."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raycompress.candidate import Candidate, Training, Trial
from raycompress.criteria import BNScale, Criterion
from raycompress.criteria.bn_scale import scale_factors
from raycompress.errors import ConfigError
from raycompress.pruning.one_shot import ChannelPruner
from raycompress.pruning.pruner import Problem
from raycompress.search import Search
from raycompress.training import ScaleSparsity

__all__ = ["Slim"]


@dataclass(frozen=True, kw_only=True)
class Slim(ChannelPruner):
    """Removes the channels whose norms scale them least, with one threshold over the model.

    Groups of channels that no norm scales are not among those that compete, and keep all their
    channels. No group is emptied.

    With `epochs` the model is first trained with penalty * sum |gamma| over all BatchNorm scales in
    its loss, as in the paper: many factors are near zero only after such training.

    Attributes:
        scope: "global": one threshold, as in the paper; "group": the same fraction of each group.
        epochs: Of training with the penalty; 0: the model is pruned as it is.
        penalty: The paper's lambda, above 0: 1e-4 for VGG, 1e-5 for ResNet-164 and DenseNet-40,
            over 160 epochs; few epochs need more.
        lr: Peak learning rate; None takes the task's own.
    """

    scope: Literal["group", "global"] = "global"
    epochs: float = 0.0
    penalty: float = 1e-4
    lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 0:
            raise ConfigError(f"Slim.epochs must be 0 or more, got {self.epochs:g}")
        if self.penalty <= 0:
            raise ConfigError(f"Slim.penalty must be above 0, got {self.penalty:g}")

    def prepared(self, problem: Problem) -> Generator[Sequence[Candidate], list[Trial], str]:
        """Trains with the penalty."""
        if not self.epochs:
            return problem.weights
        method = ScaleSparsity(strength=self.penalty)
        training = Training(self.epochs, self.lr, problem.seed, methods=(method,))
        trial = (yield [Candidate(problem.weights, training=training)])[0]
        return trial.trained()

    def scorer(self) -> Criterion:
        """|gamma|, averaged over the norms of a group."""
        return BNScale()

    def search(self, problem: Problem) -> Search:
        """Returns at once, or after its training."""
        scaled = tuple(group for group in problem.structure.groups if scale_factors(group))
        if not scaled:
            raise ConfigError(
                "Slim ranks channels by the scale factors of their norms, and no channel group of "
                "this model has a norm with such factors"
            )
        return super().search(replace(problem, structure=replace(problem.structure, groups=scaled)))
