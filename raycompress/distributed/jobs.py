"""Jobs on a running cluster, through Ray's job server: submit, follow, look at, stop.

A job may be submitted several times, each time going on where it was: submission `<name>-<n>`.
What it takes to submit it once more is in the submission's metadata.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycompress.errors import ClusterError
from raycompress.wording import near

if TYPE_CHECKING:
    from raycompress.submission import Submission

__all__ = ["JobServer", "Run"]

STOP_SECONDS = 60
"""Time for a driver to end by itself before Ray kills it; Ray's own 3 s are too short for that."""
ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",  # what is printed is seen at once
}
KEY = "raycompress.job"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
PATIENCE = 300.0
"""Seconds for which a job server that stopped answering is tried again."""
TOKEN = (
    "the cluster wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
    "RAY_AUTH_TOKEN_PATH, or put the token into ~/.ray/auth_token (`ray get-auth-token` shows the "
    "cluster's)"
)


@dataclass(frozen=True)
class Run:
    """One submission of a job.

    Attributes:
        id: `<name>-<n>`.
        name: The job's.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's word on it.
        exit_code: Of the driver; None: it hasn't ended, or was stopped.
        start: Seconds since the epoch; 0: not yet.
        end: Likewise.
        again: Folder, job file and options with which to submit it once more.
    """

    id: str
    name: str
    status: str
    message: str
    exit_code: int | None
    start: float
    end: float
    again: dict[str, Any]

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ENDED


class JobServer:
    """The job server of a cluster.

    Args:
        address: http(s)://host:port of its dashboard.

    Raises:
        ClusterError: It doesn't answer, or doesn't let us in.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ClusterError(
                f"--address must be that of the cluster's dashboard, such as "
                f"http://127.0.0.1:8265, got {address!r}"
            )
        self.address = address.rstrip("/")
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray wouldn't send it otherwise
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # The client would prefer these to the address that it is given.
        kept = {n: os.environ.pop(n, None) for n in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
        try:
            with self._errors():
                self._client = JobSubmissionClient(self.address)
        finally:
            os.environ.update({name: value for name, value in kept.items() if value is not None})

    def runs(self, name: str | None = None) -> list[Run]:
        """Submissions of a job, or of all jobs, oldest first."""
        with self._errors():
            found = [
                _run(each) for each in self._client.list_jobs() if KEY in (each.metadata or {})
            ]
        return sorted(
            (run for run in found if name in (None, run.name)),
            key=lambda run: (run.name, _number(run.id)),
        )

    def latest(self, name: str) -> Run:
        """The last submission of a job.

        Raises:
            ClusterError: There is none.
        """
        runs = self.runs(name)
        if not runs:
            known = dict.fromkeys(run.name for run in self.runs())
            there = f"; there are {', '.join(known)}" if known else "; no job was submitted there"
            raise ClusterError(f"no job {name!r} at {self.address}{near(name, known, there)}")
        return runs[-1]

    def submit(
        self,
        submission: Submission,
        again: dict[str, Any],
        *,
        python: str = "python",
        cpus: float = 0.0,
        runtime_env: dict[str, Any] | None = None,
    ) -> Run:
        """Sends a job.

        Args:
            submission: What is sent.
            again: With what it was made.
            python: The interpreter there.
            cpus: CPU cores set aside for the driver. 0: none, and it runs on the head node.
            runtime_env: More of Ray's runtime environment, such as env_vars.

        Raises:
            ClusterError: The job is running, or the server refuses it.
        """
        from raycompress.submission import pack  # it loads torch, which a look at jobs needs not

        runs = self.runs(submission.name)
        if runs and not runs[-1].ended:
            raise ClusterError(
                f"job {submission.name!r} is {runs[-1].status.lower()} as {runs[-1].id}; look at "
                f"it (raycompress status {submission.name} --follow) or stop it (raycompress stop "
                f"{submission.name})"
            )
        number = _number(runs[-1].id) + 1 if runs else 1
        extra = dict(runtime_env or {})
        environment = {**ENVIRONMENT, **extra.pop("env_vars", {})}
        with tempfile.TemporaryDirectory() as folder, self._errors():
            package = Path(folder) / "working_dir.zip"
            pack(submission.files, package)
            name: str = self._client.submit_job(
                entrypoint=submission.entrypoint(python),
                submission_id=f"{_plain(submission.name)}-{number}",
                runtime_env={**extra, "working_dir": str(package), "env_vars": environment},
                metadata={KEY: submission.name, "raycompress.again": json.dumps(again)},
                entrypoint_num_cpus=cpus or None,
            )
            return _run(self._client.get_job_info(name))

    def follow(self, run: Run, write: Callable[[str], None]) -> Run:
        """Writes a submission's output as it comes, until it ends; survives a lost connection."""
        written = 0
        lost = 0.0
        while True:
            try:
                asyncio.run(self._tail(run.id, written, write_counted := _Counted(write)))
                lost = 0.0
            except (RuntimeError, OSError) as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > PATIENCE:
                    raise ClusterError(
                        f"{self.address} doesn't answer any more ({error}); the job may go on: "
                        f"raycompress status {run.name} --follow"
                    ) from error
            if write_counted.num:
                written, lost = written + write_counted.num, 0.0
            try:
                with self._errors():
                    now = _run(self._client.get_job_info(run.id))
            except ClusterError:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > PATIENCE:
                    raise
            else:
                if now.ended:
                    return now
            time.sleep(1.0)

    async def _tail(self, name: str, skip: int, write: _Counted) -> None:
        async for text in self._client.tail_job_logs(name):
            # After a lost connection the server starts from the beginning.
            if skip >= len(text):
                skip -= len(text)
                continue
            write(text[skip:])
            skip = 0

    def log(self, run: Run) -> str:
        """All that a submission has printed."""
        with self._errors():
            text: str = self._client.get_job_logs(run.id)
        return text

    def stop(self, run: Run, seconds: float = STOP_SECONDS + 30.0) -> Run:
        """Asks a submission's driver to end, and waits until it has."""
        with self._errors():
            self._client.stop_job(run.id)
        deadline = time.monotonic() + seconds
        while True:
            with self._errors():
                now = _run(self._client.get_job_info(run.id))
            if now.ended:
                return now
            if time.monotonic() > deadline:
                raise ClusterError(f"{run.id} hasn't ended within {seconds:g} s")
            time.sleep(0.5)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever the client raises, in one line that says what to do."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(f"{self.address}: {TOKEN}") from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise ClusterError(
                f"no job server answers at {self.address}; is the cluster up, and does its "
                "dashboard listen where this machine reaches it (ray start --dashboard-host, or "
                "an SSH tunnel)?"
            ) from error
        except (RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ClusterError(f"{self.address}: {lines[-1] or lines[0]}") from error


class _Counted:
    """Writes text, and counts it."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.num = 0
        self._write = write

    def __call__(self, text: str) -> None:
        self._write(text)
        self.num += len(text)


def _plain(name: str) -> str:
    """A name that can be part of an address; others than that have a digest in it."""
    plain = re.sub(r"[^\w.-]", "_", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _run(details: Any) -> Run:
    metadata = details.metadata or {}
    return Run(
        id=details.submission_id,
        name=metadata[KEY],
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        exit_code=details.driver_exit_code,
        start=(details.start_time or 0) / 1000,
        end=(details.end_time or 0) / 1000,
        again=json.loads(metadata.get("raycompress.again", "{}")),
    )
