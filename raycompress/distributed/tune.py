"""Ray Tune runs each pruner's search as one trial, with its replicas in one placement group.

Tune schedules and restarts; it holds no state of ours. What is done is known by the marker that
each trial leaves when it has finished; what was evaluated is in the ledger. So a restarted job
makes a new Tuner, and no pickle of Tune's is ever read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from raycompress.config import ClusterConfig
from raycompress.distributed.cluster import bundle
from raycompress.distributed.losses import advised, loss_reason
from raycompress.distributed.pool import ReplicaPool
from raycompress.distributed.spec import PoolSpec, SharedSpec, TrialSpec, import_object
from raycompress.distributed.watching import (
    FULL,
    MAX_RETRIES,
    OnReport,
    check_room,
    full_disk,
    name_of,
    overseer,
    quiet,
    stopping,
    watching,
)
from raycompress.errors import ClusterError, EvaluationError, InputError, StorageError
from raycompress.storage import Place, place_of, write_whole, writing

__all__ = ["TrialSpec", "run_samples", "run_trials"]

_log = logging.getLogger(__name__)

Finished = Callable[[Mapping[str, Any]], dict[str, Any] | None]
"""The result that a trial with this payload has left as its marker; None: it hasn't finished."""


@dataclass(frozen=True)
class _Common:
    """What every trial gets, through the object store."""

    run: str
    specs: Mapping[str, TrialSpec]
    spec: SharedSpec
    cluster: ClusterConfig
    output: str
    shared: Any


def run_trials(
    specs: Sequence[TrialSpec],
    run: str,
    pool: PoolSpec,
    cluster: ClusterConfig,
    output: Place,
    finished: Finished,
    *,
    on_report: OnReport | None = None,
    shared: Any = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Runs trials; those that finished in an earlier run of the job are not run again.

    Args:
        specs: The trials.
        run: Import path "package.module:function" of what a trial does:
            `run(payload, make_pool, report, shared)`. `make_pool(ledger=None, progress=None)` gives
            a `ReplicaPool` in the trial's placement group, a context manager; `report(step,
            metrics)` sends numbers to the driver; `shared` is read-only. It leaves its result where
            `finished` finds it; what it returns is dropped.
        pool: What the replicas host.
        cluster: Resources and deadlines.
        output: The job's folder; Tune's own files go below `<output>/tune`.
        finished: Looks for the marker of a trial.
        on_report: Called in the driver with (trial, step, metrics), for each step of a trial once
            and in order, also where a trial was restarted and replayed; True stops the trial.
        shared: For all trials; put into the object store once.

    Returns:
        Results, and of the trials that failed their own exceptions' texts, by trial name; those
        that were stopped are in neither.

    Raises:
        ClusterError: A trial can never fit the cluster, or not any more.
        StorageError: A trial, or one of its replicas, had no space left; all have been stopped.
        KeyboardInterrupt: SIGINT or SIGTERM; the trials have been stopped.
    """
    folder = _absolute(output) / "tune"
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) != len(specs):
        raise ValueError("names of trials must differ")
    results = {name: finished(spec.payload) for name, spec in by_name.items()}
    missing = [name for name, result in results.items() if result is None]
    failures: dict[str, str] = {}
    if missing:
        check_room(cluster, cluster.start_timeout)
        common = _Common(
            run,
            {name: by_name[name] for name in missing},
            pool.share(),
            cluster,
            str(folder),
            ray.put(shared),
        )
        errors, stopped = _fit(common, None, on_report)
        results |= {name: finished(by_name[name].payload) for name in missing}
        failures = {
            name: errors.get(name, "it never finished")
            for name in missing
            if results[name] is None and name not in stopped
        }
    return {name: result for name, result in results.items() if result is not None}, failures


def run_samples(
    ask: Callable[[], TrialSpec | None],
    tell: Callable[[str, Mapping[str, Any] | None, str | None], object],
    num_samples: int | None,
    run: str,
    pool: PoolSpec,
    cluster: ClusterConfig,
    output: Place,
    finished: Finished,
    *,
    on_report: OnReport | None = None,
    shared: Any = None,
) -> None:
    """Runs the trials that a study gives out, as many at once as fit; others as in `run_trials`.

    Args:
        ask: Gives the next trial when there is room for one; None: there are no more.
        tell: Called when a trial has ended, before the next is asked for, with its name, and its
            result or why it failed; with neither if it was stopped or lost.
        num_samples: Trials at most; None: as `ask` has it.
        run: Import path of what a trial does.
        pool: What the replicas host.
        cluster: Resources and deadlines.
        output: The job's folder.
        finished: Looks for the marker of a trial.
        on_report: Called in the driver with (trial, step, metrics); True stops the trial.
        shared: For all trials.

    Raises:
        ClusterError: A trial can never fit the cluster, or not any more.
        StorageError: A trial, or one of its replicas, had no space left; all have been stopped.
        KeyboardInterrupt: SIGINT or SIGTERM; the trials have been stopped.
    """
    folder = _absolute(output) / "tune"
    if num_samples == 0:
        return
    check_room(cluster, cluster.start_timeout)
    common = _Common(run, {}, pool.share(), cluster, str(folder), ray.put(shared))
    specs: dict[str, TrialSpec] = {}

    def asked() -> TrialSpec | None:
        spec = ask()
        if spec is not None:
            specs[spec.name] = spec
            _error(folder, spec.name).unlink(missing_ok=True)
        return spec

    def ended(name: str) -> None:
        path, result = _error(folder, name), finished(specs[name].payload)
        failed = result is None and path.exists()  # also where only an earlier attempt did
        tell(name, result, json.loads(path.read_text())["error"] if failed else None)

    from raycompress.distributed.searcher import GivenOut

    given = GivenOut(asked, ended)
    _fit(common, given, on_report, -1 if num_samples is None else num_samples)


def _fit(
    common: _Common,
    searcher: Any,
    on_report: OnReport | None,
    num_samples: int = 1,
) -> tuple[dict[str, str], set[str]]:
    """Runs Tune over the common trials, or over those of a searcher.

    Returns:
        Why each failed one did, and those that were stopped.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints even at verbose 0
    from ray import tune

    folder, names = place_of(common.output), list(common.specs)
    for name in names:
        _error(folder, name).unlink(missing_ok=True)
    # The head bundle is empty: the trial's process only proposes and records. A CPU for it would
    # keep N replicas of one core from fitting N cores.
    bundles = [{}, *([dict(bundle(common.cluster))] * common.cluster.replicas)]
    trainable = tune.with_resources(
        tune.with_parameters(_trial, common=common), tune.PlacementGroupFactory(bundles, "PACK")
    )
    watch, disk = watching(on_report), full_disk()
    with quiet(), stopping() as stopped, _own_files(folder) as storage:

        def fit() -> Any:
            left = [name for name in names if name not in watch.ended]
            return tune.Tuner(
                trainable,
                param_space={"name": tune.grid_search(left)} if names else {},
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=watch,
                    num_samples=num_samples,
                    trial_name_creator=name_of,
                    trial_dirname_creator=name_of,
                    max_concurrent_trials=common.cluster.max_concurrent,
                ),
                run_config=tune.RunConfig(
                    name=_run_name(folder),
                    storage_path=str(storage),
                    verbose=0,
                    stop=disk,
                    failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
                    callbacks=[overseer(stopped, common.cluster)],
                ),
            ).fit()

        grid = _whatever_memory(fit, watch, searcher)
    if stopped.is_set():
        raise KeyboardInterrupt
    if disk.reason is not None:
        raise StorageError(disk.reason)
    errors = {}
    for result in (grid[i] for i in range(len(grid))):
        if result.error is not None:
            reason = str(result.error).strip().splitlines()[-1]
            errors[str((result.config or {})["name"])] = (
                f"its process was lost {MAX_RETRIES + 1} times without a new step: {reason}"
            )
    for name in names:
        path = _error(folder, name)
        if path.exists():
            errors[name] = json.loads(path.read_text())["error"]
    return errors, watch.stopped


def _whatever_memory(fit: Callable[[], Any], watch: Any, searcher: Any) -> Any:
    """Runs Tune anew where Ray has killed a trial's process for lack of memory.

    Tune takes any other loss of a process, and gives up at this one. Trials go on from the ledger.

    Raises:
        EvaluationError: It happened again and again, and no trial came further.
    """
    kills, steps = 0, watch.num_steps
    while True:
        try:
            return fit()
        except RuntimeError as error:
            if not isinstance(error.__cause__, ray.exceptions.OutOfMemoryError):
                raise
            kills = kills + 1 if watch.num_steps == steps else 1
            steps = watch.num_steps
            reason = loss_reason(error.__cause__)
            if kills > MAX_RETRIES:
                raise EvaluationError(
                    f"a trial was lost {kills} times without a new step: {advised(reason)}"
                ) from error
            _log.warning("trials start again: of one of them, %s", reason)
            if searcher is not None:
                searcher.start_again()


def _trial(config: Mapping[str, Any], common: _Common) -> None:
    """The body of a Tune trial, in its own process."""
    import sys

    from ray import tune

    name = config["name"]
    spec = common.specs.get(name) or TrialSpec(name, json.loads(config["payload"]))
    for path in reversed(common.spec.import_paths):
        if path not in sys.path:
            sys.path.insert(0, path)

    def report(step: int, metrics: Mapping[str, float]) -> None:
        tune.report({**metrics, "step": step, "reported": sorted(metrics)})

    try:
        _search(spec, common, report)
    except StorageError as error:  # no room for a file either
        tune.report({FULL: str(error)})


def _search(spec: TrialSpec, common: _Common, report: Callable[..., None]) -> None:
    """Runs a trial; why it failed is left in a file.

    Raises:
        StorageError: There is no space left, which is no trial's failure.
        Exception: It failed, and may not if it is tried again.
    """
    folder = place_of(common.output)
    make_pool = partial(ReplicaPool, common.spec, common.cluster, reserved=True)
    try:
        run = import_object(common.run)
        with writing(folder):
            run(dict(spec.payload), make_pool, report, ray.get(common.shared))
    except StorageError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        write_whole(_error(folder, spec.name), json.dumps({"error": text}).encode())
        lasting = isinstance(error, InputError | EvaluationError)
        if lasting and not isinstance(error, ClusterError):  # nodes come back
            return
        raise


def _absolute(output: Place) -> Place:
    return output.absolute() if isinstance(output, Path) else output


@contextmanager
def _own_files(folder: Place) -> Iterator[Path]:
    """Where Tune keeps what only it reads, in this run; it would be slow in an object store."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="raycompress-tune-") as name:
        yield Path(name)


def _run_name(folder: Place) -> str:
    """Of Tune's run; it tells jobs apart that start in one second, for whom Tune has one folder."""
    return f"trials-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def _error(folder: Place, name: str) -> Place:
    return folder / f"{name}.error.json"
