"""Movement pruning as a pruner; the training is in `training/movement.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raycompress.candidate import Candidate, Training
from raycompress.criteria import Magnitude
from raycompress.errors import ConfigError
from raycompress.pruning.pruner import Problem, Pruner
from raycompress.pruning.units import check_sparsity, plan_units
from raycompress.search import Search
from raycompress.training.movement import Movement

__all__ = ["MovementPruning"]


@dataclass(frozen=True, kw_only=True)
class MovementPruning(Pruner):
    """Removes the weights that move toward zero while the model is fine-tuned (2005.07683).

    One training learns scores and weights together; then what the scores remove is removed.

    Attributes:
        sparsity: Fraction of each layer's weights removed, in [0, 1); targets and budgets
            override it. Not for soft pruning.
        epochs: Of training, above 0.
        score_lr: Learning rate of the scores.
        warm_up: Share of the steps before pruning starts, in [0, 1).
        cool_down: Share of the steps after the final sparsity is reached, in [0, 1).
        soft: Remove what has a score whose sigmoid is at most `threshold` in the end, instead of a
            given fraction; score_lr and the penalty decide how much that is.
        threshold: Of the scores' sigmoid, in [0, 1) (soft). Scores begin at 0, where it is 1/2: 0.5
            removes what lost score. The authors have 0.1, with scores trained by Adam.
        penalty: Of the scores' mean sigmoid in the loss (soft).
        retrain_epochs: Of training with the final mask; 0: none.
        lr: Peak learning rate; None takes the task's own.
    """

    sparsity: float | None = None
    epochs: float = 3.0
    score_lr: float = 1e-2
    warm_up: float = 0.1
    cool_down: float = 0.2
    soft: bool = False
    threshold: float = 0.5
    penalty: float = 1.0
    retrain_epochs: float = 0.0
    lr: float | None = None

    def __post_init__(self) -> None:
        check_sparsity("MovementPruning", self.sparsity)
        for name in ("epochs", "score_lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"MovementPruning.{name} must be above 0, got {getattr(self, name):g}"
                )
        if min(self.warm_up, self.cool_down) < 0 or self.warm_up + self.cool_down >= 1:
            raise ConfigError(
                "MovementPruning: warm_up and cool_down must be 0 or more and below 1 together, "
                f"got {self.warm_up:g} and {self.cool_down:g}"
            )
        if self.soft and self.sparsity is not None:
            raise ConfigError(
                "MovementPruning: soft pruning finds its own sparsity; give soft or sparsity"
            )
        if not 0 <= self.threshold < 1:
            raise ConfigError(
                f"MovementPruning.threshold must be in [0, 1), got {self.threshold:g}"
            )
        if self.penalty < 0:
            raise ConfigError(f"MovementPruning.penalty must be 0 or more, got {self.penalty:g}")
        if self.retrain_epochs < 0:
            raise ConfigError(
                f"MovementPruning.retrain_epochs must be 0 or more, got {self.retrain_epochs:g}"
            )

    def search(self, problem: Problem) -> Search:
        """Yields the training, then the retraining with the final mask."""
        if self.soft and problem.budget is not None:
            raise ConfigError("MovementPruning: soft pruning can't meet a budget; use hard")
        asked_for = 0.0 if self.soft else self.sparsity
        units = plan_units(problem, Magnitude(), "MovementPruning", asked_for)
        method = Movement(
            parameters=tuple(units.num),
            sparsity=tuple(units.sparsity[key] for key in units.num),
            score_lr=self.score_lr,
            warm_up=self.warm_up,
            cool_down=self.cool_down,
            soft=self.soft,
            threshold=self.threshold,
            penalty=self.penalty,
        )
        training = Training(self.epochs, self.lr, problem.seed, methods=(method,))
        trial = (yield [Candidate(problem.weights, training=training)])[0]
        weights = trial.trained()
        extra = problem.store.get(weights).extra
        scores = {key: extra[f"{key}.score"] for key in units.num}
        counts = units.final(scores)
        if self.soft:
            counts = {key: max(int(method.kept(s).sum()), 1) for key, s in scores.items()}
        ranking = problem.ranking("weights", scores)
        after = Training(self.retrain_epochs, self.lr, problem.seed + 1000)
        asked = problem.candidate(counts, ranking, weights=weights, training=after)
        trained = (yield [asked])[0].trained()
        return replace(asked, weights=trained, training=None)
