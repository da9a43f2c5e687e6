"""The commands that act on a cluster from elsewhere: submit, status, stop."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raycompress.errors import ConfigError, InterruptedJob, RaycompressError
from raycompress.terminal import Stopped, guarded

if TYPE_CHECKING:
    from raycompress.distributed.jobs import JobServer, Run

__all__ = ["status", "stop", "submit"]

Address = Annotated[
    str,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        help="http address of the cluster's dashboard.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Name = Annotated[str, typer.Argument(help="A job's name.")]
LOCAL = "http://127.0.0.1:8265"


def submit(
    job: Annotated[Path | None, typer.Argument(help="A job file (YAML).")] = None,
    address: Address = LOCAL,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="Name of a job to submit once more, as it was, from here."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key, such as cluster.replicas=3; may be repeated."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", help="Folder there, absolute, of everything that the job writes."),
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Go on in an output that holds other settings.")
    ] = False,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", help="Folder whose code is sent.")
    ] = Path("."),
    python: Annotated[str, typer.Option("--python", help="The interpreter there.")] = "python",
    driver_cpus: Annotated[
        float,
        typer.Option(
            "--driver-cpus",
            help="CPU cores set aside for the driver; 0: none, and it runs on the head node. "
            "It never needs a GPU.",
        ),
    ] = 0.0,
    runtime_env: Annotated[
        Path | None,
        typer.Option("--runtime-env", help="YAML file with more of Ray's runtime environment."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Don't follow the job.")] = False,
    debug: Debug = False,
) -> None:
    """Send a job to a cluster, follow it, and exit as it does; Ctrl-C leaves it running."""

    def action() -> None:
        from raycompress.submission import prepare_submission

        if (job is None) == (resume is None):
            raise ConfigError("give a job file, or --resume with the name of a job")
        if driver_cpus < 0:
            raise ConfigError(f"--driver-cpus must be 0 or more, got {driver_cpus:g}")
        extra = {} if runtime_env is None else _read_environment(runtime_env)
        if job is not None:
            again: dict[str, Any] = {
                "job": str(job.absolute()),
                "set": list(set_ or ()),
                "output": output,
                "folder": str(working_dir.absolute()),
                "python": python,
                "cpus": driver_cpus,
                "runtime_env": extra,
            }
            server = None
        else:
            if set_ or output is not None or runtime_env is not None:
                raise ConfigError("--resume submits a job as it was; give its file to change it")
            assert resume is not None
            server = _server(address)
            again = server.latest(resume).again
            if not Path(again["job"]).is_file():
                raise ConfigError(
                    f"--resume: {resume!r} was submitted from {again['folder']} with the file "
                    f"{again['job']}, which isn't on this machine; give the job file"
                )
        submission = prepare_submission(
            job if job is not None else Path(again["job"]),
            again["set"],
            again["output"],
            Path(again["folder"]),
            changed=changed,
        )
        server = server if server is not None else _server(address)
        run = server.submit(
            submission,
            again,
            python=again["python"],
            cpus=again["cpus"],
            runtime_env=again["runtime_env"],
        )
        files = submission.files
        _say(f"{run.id}: {len(files.sizes)} files, {files.num_bytes / 1024**2:.1f} MiB, sent")
        if not detach:
            _follow(server, run)

    guarded(action, debug)


def status(
    name: Annotated[str | None, typer.Argument(help="A job's name; all jobs without it.")] = None,
    address: Address = LOCAL,
    follow: Annotated[
        bool, typer.Option("--follow", help="Follow it, and exit as it does.")
    ] = False,
    log: Annotated[bool, typer.Option("--log", help="Print all that it has printed.")] = False,
    debug: Debug = False,
) -> None:
    """Say how submitted jobs are doing."""

    def action() -> None:
        server = _server(address)
        if name is None:
            if follow or log:
                raise ConfigError("--follow and --log need the name of a job")
            latest = {run.name: run for run in server.runs()}
            for run in latest.values():
                print(_line(run))
            if not latest:
                _say(f"no job was submitted at {server.address}")
            return
        run = server.latest(name)
        if log:
            sys.stdout.write(server.log(run))
        if follow:
            _follow(server, run)
        elif not log:
            for each in server.runs(name):
                print(_line(each))

    guarded(action, debug)


def stop(name: Name, address: Address = LOCAL, debug: Debug = False) -> None:
    """Stop a job so that it can be resumed: its driver keeps what is finished, and ends."""

    def action() -> None:
        server = _server(address)
        run = server.latest(name)
        if run.ended:
            raise ConfigError(f"{run.id} has ended already: {run.status.lower()}")
        ended = server.stop(run)
        if ended.status != "STOPPED":
            _say(f"{ended.id} ended before it was stopped: {ended.status.lower()}")
            return
        last = [line for line in server.log(ended).splitlines() if "stopped; what was" in line]
        _say(
            last[-1].removeprefix("error: ")
            if last
            else f"{ended.id} was killed; what was finished is kept"
        )
        _say(f"continue:  raycompress submit --resume {name} --address {server.address}")

    guarded(action, debug)


def _server(address: str) -> JobServer:
    from raycompress.distributed.jobs import JobServer

    return JobServer(address)


def _read_environment(path: Path) -> dict[str, Any]:
    from raycompress.source import Source

    data = Source.read(path).data
    if "working_dir" in data:
        raise ConfigError(f"{path}: working_dir is what submit sends; use --working-dir")
    variables = data.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(v, str) for v in variables.values()):
        raise ConfigError(f"{path}: env_vars must be a mapping of names to text, got {variables}")
    return data


def _follow(server: JobServer, run: Run) -> None:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        ended = server.follow(run, write)
    except KeyboardInterrupt:
        raise Stopped(
            f"{run.id} goes on; raycompress status {run.name} --follow, or raycompress stop "
            f"{run.name}"
        ) from None
    if ended.status == "STOPPED":
        raise InterruptedJob(
            f"{run.id} was stopped; continue with raycompress submit --resume {run.name} "
            f"--address {server.address}"
        )
    if ended.status == "FAILED" and ended.exit_code is None:
        raise RaycompressError(f"{run.id} failed: {ended.message.strip()}")
    if ended.exit_code:
        _say(f"{run.id} failed with exit code {ended.exit_code}")
        raise typer.Exit(ended.exit_code)
    _say(f"{run.id} is done")


def _line(run: Run) -> str:
    """One line on a run."""
    words = f"{run.id}  {run.status.lower()}"
    if run.exit_code:
        words += f" (exit code {run.exit_code})"
    if run.start:
        words += f"  since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(run.start))}"
        words += f"  {(run.end or time.time()) - run.start:.0f} s"
    return words


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
