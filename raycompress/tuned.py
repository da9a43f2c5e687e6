"""A study's samples as trials of a job: given out one by one, and what came of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from raycompress.candidate import digest_of
from raycompress.plan import StudyPlan, TrialPlan
from raycompress.results import SampleRow
from raycompress.trial import Shared, finished, save_result, unfinished
from raycompress.tuning import Sample, Searcher, Study
from raycompress.watch import Watch

__all__ = ["OnSample", "Samples"]

LOST = "its process was lost; the same command runs it again"

OnSample = Callable[[SampleRow, bool], None]
"""Called with a sample when it is given out and when it has ended, and whether that is news."""


class Samples:
    """The samples of one study; a context manager.

    What was finished, failed or stopped in an earlier run of the job is taken up and not run again.

    Args:
        plan: The study.
        searcher: Proposes points; the plan's own, or one of Ray Tune's.
        shared: The job.
        watch: Takes their steps.
        on_sample: Told of each.
    """

    def __init__(
        self,
        plan: StudyPlan,
        searcher: Searcher,
        shared: Shared,
        watch: Watch,
        on_sample: OnSample,
    ) -> None:
        self.plan, self.shared, self.watch, self.on_sample = plan, shared, watch, on_sample
        tune = plan.tune
        first = plan.space.draw(random.Random(0))
        key = digest_of(
            {
                "trial": shared.payload(plan.trial(0, first))["key"],
                "entries": [dict(entry) for entry in plan.space.entries],
                "searcher": tune.searcher,
                "objectives": list(tune.objectives),
                "scheduler": [tune.scheduler, tune.grace, tune.factor],
            }
        )
        self.study = Study(
            searcher, tune.num_samples, tune.objectives, shared.output / "studies", plan.name, key
        )
        self._numbers: dict[str, int] = {}
        for sample in list(self.study.samples):
            self._take_up(sample)

    def _take_up(self, sample: Sample) -> None:
        trial, payload = self._trial(sample)
        result = finished(self.shared, payload)
        if sample.state in ("finished", "stopped") and result is None:
            self.study.reopen(sample.number)  # its marker has gone
            return
        if sample.state == "running":
            return
        self.watch.remember(trial.name, self.plan.name, [] if result is None else result["curve"])
        self.on_sample(self.row(sample), False)

    def _trial(self, sample: Sample) -> tuple[TrialPlan, dict[str, Any]]:
        trial = self.plan.trial(sample.number, sample.point)
        self._numbers[trial.name] = sample.number
        return trial, self.shared.payload(trial)

    def ask(self) -> dict[str, Any] | None:
        """The payload of the next sample to run; None: all have been given out."""
        sample = self.study.ask()
        if sample is None:
            return None
        trial, payload = self._trial(sample)
        self.watch.compare(trial.name, self.plan.name)
        self.on_sample(self.row(sample), True)
        return payload

    def tell(self, name: str, result: Mapping[str, Any] | None, failure: str | None) -> None:
        """What came of a sample: its result, its failure, or neither if it was stopped or lost."""
        number = self._numbers[name]
        _, payload = self._trial(self.study.samples[number])
        state = "finished"
        if name in self.watch.stopped:
            state = "stopped"
            result = unfinished(payload, self.watch.curves[name], stopped=self.watch.stopped[name])
            save_result(self.shared, payload, result)
        elif result is None:
            if failure is None:
                return  # its process was lost; the next run of the job runs it again
            state = "failed"
            result = unfinished(payload, self.watch.curves[name], failure=failure)
        figures = {
            "score": result["score"],
            "loss": result["loss"],
            "macs": result.get("macs"),
            "params": result.get("params"),
            "dfe": result["total_dfe"],
        }
        told = {"state": state, "figures": figures, "failure": failure}
        self.on_sample(self.row(self.study.tell(number, told)), True)

    def row(self, sample: Sample) -> SampleRow:
        """A sample as it is reported."""
        figures = sample.figures
        return SampleRow(
            name=self.plan.trial(sample.number, sample.point).name,
            study=self.plan.name,
            settings=self.plan.space.settings(sample.point),
            state=sample.state,
            score=figures.get("score"),
            loss=figures.get("loss"),
            macs=figures.get("macs"),
            params=figures.get("params"),
            dfe=figures.get("dfe") or 0.0,
            failure=sample.failure,
        )

    def rows(self) -> list[SampleRow]:
        """All samples when none runs any more; those that none beats are marked."""
        best = {sample.number for sample in self.study.best()}
        rows = []
        for sample in self.study.samples:
            row = replace(self.row(sample), best=sample.number in best)
            if row.state == "running":
                row = replace(row, state="failed", failure=LOST)
            rows.append(row)
        return rows

    def kept(self) -> list[tuple[TrialPlan, dict[str, Any]]]:
        """The best samples, as trials with their results."""
        found = []
        for sample in self.study.ranked()[: self.plan.tune.keep]:
            trial, payload = self._trial(sample)
            result = finished(self.shared, payload)
            assert result is not None
            found.append((trial, result))
        return found

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *exc: object) -> None:
        self.study.close()
