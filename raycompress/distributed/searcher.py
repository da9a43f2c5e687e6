"""Ray Tune's searchers: one of them as a study's, and a study as one of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune.search import Searcher as RaySearcher

from raycompress.distributed.spec import TrialSpec, import_object
from raycompress.errors import ConfigError
from raycompress.tuning.entries import Point, SearchSpace
from raycompress.tuning.searchers import OBJECTIVES, NotYet, Sample
from raycompress.tuning.spaces import Integers, OneOf, Space

__all__ = ["GivenOut", "TuneSearcher"]

_log = logging.getLogger(__name__)


class TuneSearcher:
    """Proposes what a searcher of Ray Tune suggests; see `raycompress.tuning.Searcher`.

    What it is told is each sample's objectives, when they are known. One that starts again with a
    job is told what was finished before by its `add_evaluated_point`, if it has one.

    Args:
        path: Import path of a function that makes it, called with keywords: `space`, a domain of
            Tune for each parameter; `metric` and `mode`, one of each, or a list for several
            objectives; `seed`.
        space: What is searched.
        objectives: Names.
        seed: Of the study.

    Raises:
        ConfigError: The function can't be imported or called, or makes something else.
    """

    def __init__(self, path: str, space: SearchSpace, objectives: Sequence[str], seed: int) -> None:
        self.space, self.objectives = space, list(objectives)
        domains = {name: _domain(each) for name, each in space.parameters().items()}
        modes: list[str] = [OBJECTIVES[name] for name in objectives]
        one = len(modes) == 1
        try:
            make = import_object(path)
            self.searcher = make(
                space=domains,
                metric=self.objectives[0] if one else self.objectives,
                mode=modes[0] if one else modes,
                seed=seed,
            )
        except Exception as error:
            raise ConfigError(
                f"tune.searcher: {path} can't make a searcher: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(self.searcher, RaySearcher):
            raise ConfigError(
                f"tune.searcher: {path} must return a ray.tune.search.Searcher, "
                f"got {self.searcher!r}"
            )
        self._asked: set[int] = set()
        self._told: set[int] = set()

    def propose(self, number: int, history: Sequence[Sample]) -> Point | None:
        """What it suggests, after it has been told what is new.

        Raises:
            NotYet: It waits for what runs.
        """
        for sample in history:
            if sample.state != "running" and sample.number not in self._told:
                self._tell(sample)
        found = self.searcher.suggest(str(number))
        if found is None:
            raise NotYet
        if found == RaySearcher.FINISHED:
            return None
        self._asked.add(number)
        return {name: _plain(found[name]) for name in self._needed(found)}

    def _needed(self, found: dict[str, Any]) -> list[str]:
        index = int(found.get("pruner", 0))
        own = self.space.below(index)
        return [name for name in found if name == "pruner" or name in own]

    def _tell(self, sample: Sample) -> None:
        self._told.add(sample.number)
        result = dict(zip(self.objectives, sample.objectives, strict=False))
        if sample.number in self._asked:
            if result:
                self.searcher.on_trial_complete(str(sample.number), {**result, "done": True})
            else:
                self.searcher.on_trial_complete(str(sample.number), error=True)
            return
        values = list(sample.objectives)
        if not values:
            return
        try:
            # Parameters of pruners that weren't taken have no part in it, and any value.
            default = {name: each.corners()[0] for name, each in self.space.parameters().items()}
            self.searcher.add_evaluated_point(
                {**default, **sample.point}, values[0] if len(values) == 1 else values
            )
        except NotImplementedError:
            _log.warning(
                "%s can't be told of sample %d, which was finished in an earlier run",
                type(self.searcher).__name__,
                sample.number,
            )


def _domain(space: Space) -> Any:
    if isinstance(space, OneOf):
        return tune.choice(list(space.options))
    if isinstance(space, Integers):
        return tune.randint(space.low, space.high + 1)
    kind = tune.loguniform if space.log else tune.uniform
    return kind(space.low, space.high)


def _plain(value: Any) -> Any:
    """Searchers return numpy's scalars."""
    return value.item() if hasattr(value, "item") else value


class GivenOut(RaySearcher):
    """Tune's view of a study: each suggestion is a trial, whose payload is its configuration.

    Args:
        ask: Gives the next trial; None: all have been given out.
        ended: Called with the name of a trial that has ended, however it did.
    """

    def __init__(self, ask: Callable[[], TrialSpec | None], ended: Callable[[str], None]) -> None:
        super().__init__()
        self._ask, self._ended = ask, ended
        self._running: dict[str, TrialSpec] = {}
        self._lost: list[TrialSpec] = []

    def start_again(self) -> None:
        """Tune starts anew: what was running is given out once more, first."""
        self._lost += self._running.values()
        self._running.clear()

    def suggest(self, trial_id: str) -> Any:
        """The next one, None to wait, or "FINISHED"."""
        try:
            spec = self._lost.pop(0) if self._lost else self._ask()
        except NotYet:
            return None
        if spec is None:
            return RaySearcher.FINISHED
        self._running[trial_id] = spec
        # As text: Tune would take keys of a mapping for its own.
        return {"name": spec.name, "payload": json.dumps(dict(spec.payload))}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Passes it on."""
        self._ended(self._running.pop(trial_id).name)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study has its own log."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles it into a snapshot that is never read; a study can't be pickled.
        return (RaySearcher, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> GivenOut:
        return self
