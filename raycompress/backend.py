"""Where the work of a job runs: what stages ask for, and this process as the simplest answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from raycompress.errors import StorageError
from raycompress.executor import LedgerExecutor
from raycompress.ledger import Ledger
from raycompress.local import LocalExecutor
from raycompress.plan import Plan, StudyPlan
from raycompress.storage import writing
from raycompress.trial import Shared, run_trial
from raycompress.tuned import Samples
from raycompress.tuning import Searcher
from raycompress.watch import Watch
from raycompress.weights import WeightStore

__all__ = ["Backend", "LocalBackend"]

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Where a job's work runs."""

    def pool(
        self, plan: Plan, ledger: Ledger, progress: Callable[[int, int, float], None]
    ) -> LedgerExecutor:
        """Executors for what is outside of trials; closed before trials start."""

    def run_trials(
        self, plan: Plan, payloads: Sequence[Mapping[str, Any]], shared: Shared, watch: Watch
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Runs trials; returns results, and the reasons of those that failed, by name.

        Those that the watch stops are in neither.
        """

    def searcher(self, study: StudyPlan) -> Searcher:
        """Who proposes a study's samples."""

    def run_samples(self, plan: Plan, samples: Samples, shared: Shared, watch: Watch) -> None:
        """Runs a study's samples as trials until it gives out no more."""


class LocalBackend:
    """Everything in this process, one unit after the other."""

    def pool(
        self, plan: Plan, ledger: Ledger, progress: Callable[[int, int, float], None]
    ) -> LedgerExecutor:
        """A `LocalExecutor`."""
        return LocalExecutor(
            plan.task,
            plan.structure,
            WeightStore(plan.output / "weights"),
            plan.config.evaluation,
            ledger=ledger,
            progress=progress,
        )

    def run_trials(
        self, plan: Plan, payloads: Sequence[Mapping[str, Any]], shared: Shared, watch: Watch
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """One trial after the other."""
        results, failures = {}, {}
        for payload in payloads:
            result, failure = self._run(plan, payload, shared, watch)
            if result is not None:
                results[str(payload["name"])] = result
            if failure is not None:
                failures[str(payload["name"])] = failure
        return results, failures

    def searcher(self, study: StudyPlan) -> Searcher:
        """The study's own."""
        return study.searcher()

    def run_samples(self, plan: Plan, samples: Samples, shared: Shared, watch: Watch) -> None:
        """One sample after the other."""
        while (payload := samples.ask()) is not None:
            samples.tell(str(payload["name"]), *self._run(plan, payload, shared, watch))

    def _run(
        self, plan: Plan, payload: Mapping[str, Any], shared: Shared, watch: Watch
    ) -> tuple[dict[str, Any] | None, str | None]:
        """A trial's result, or why it failed; neither if it was stopped."""
        name = str(payload["name"])

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            if watch(name, step, metrics):
                raise _Stopped

        def make_pool(ledger: Ledger) -> LedgerExecutor:
            return self.pool(plan, ledger, lambda *_: None)

        try:
            with writing(shared.output):
                return run_trial(payload, make_pool, on_step, shared), None
        except _Stopped:
            return None, None
        except StorageError:  # it is no trial's failure, and the others would meet it too
            raise
        except Exception as error:  # of a pruner, perhaps the user's own: the others go on
            _log.debug("trial %s failed", name, exc_info=True)
            return None, f"{type(error).__name__}: {error}"


class _Stopped(BaseException):
    """Unwinds a trial that is to stop; no search may catch it."""
