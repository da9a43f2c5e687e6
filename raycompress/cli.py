"""The command line. Exit codes: 0 done, 1 the job failed, 2 bad input, 75 stopped and resumable.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from raycompress.errors import InputError, RaycompressError

__all__ = ["app", "main"]

EPILOG = (
    "Exit codes: 0 done; 1 the job failed; 2 bad input, nothing was started; "
    "75 stopped, the same command continues."
)

app = typer.Typer(
    help="Make trained PyTorch models smaller and faster, on a Ray cluster.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Job = Annotated[Path, typer.Argument(help="A job file (YAML).")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key, such as cluster.replicas=3; may be repeated."),
]
Output = Annotated[
    str | None, typer.Option("--output", help="Folder of everything that the job writes.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def main() -> None:
    """Entry point."""
    app()


def _guarded(action: Callable[[], None], debug: bool, source: Path | None = None) -> None:
    """Runs a command; errors raised on purpose become one message and an exit code."""
    try:
        action()
    except RaycompressError as error:
        if debug:
            raise
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        for line in str(error).splitlines():
            # What is wrong beyond the file's own text, such as a layer's name, is its too.
            if isinstance(error, InputError) and source is not None:
                named = line.startswith(("--set", str(source)))
                line = line if named else f"{source}: {line}"
            console.print("[bold red]error:[/] ", end="")
            console.print(line, markup=False)
        raise typer.Exit(error.exit_code) from None


def _load(job: Path, overrides: list[str] | None, output: str | None) -> Any:
    from raycompress.loading import load_job

    extra = [] if output is None else [f"output={output}"]
    return load_job(job, [*(overrides or []), *extra])


def _run(config: Any, json: bool, quiet: bool) -> None:
    from raycompress.driver import run
    from raycompress.progress import progress_for
    from raycompress.tracking.report import report_table

    result = run(config, progress=progress_for(quiet))
    console = Console(stderr=json, width=None if sys.stdout.isatty() else 200)
    console.print(report_table(result))
    for trial in result.trials:
        if trial.verification is not None:
            console.print(
                f"{trial.name}: slim against masked is {trial.verification.kind} "
                f"(relative error {trial.verification.max_error:.1e})",
                highlight=False,
            )
    if result.model_uri:
        console.print(f"model:  {result.model_uri}", highlight=False, soft_wrap=True)
    console.print(f"report: {result.output}/results/report.md", highlight=False, soft_wrap=True)
    if result.tracking_uri:
        console.print(f"look:   raycompress ui {result.output}", highlight=False, soft_wrap=True)
    if json:
        print(result.to_json())


@app.command(epilog=EPILOG)
def run(
    job: Job,
    set_: Set = None,
    output: Output = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a job; the same command continues one that was stopped."""
    _guarded(lambda: _run(_load(job, set_, output), json, quiet), debug, job)


@app.command(epilog=EPILOG)
def sensitivity(
    job: Job,
    set_: Set = None,
    output: Output = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a job's sensitivity analysis alone."""

    def action() -> None:
        from dataclasses import replace

        from raycompress.config import SensitivityConfig

        config = _load(job, set_, output)
        config = replace(config, sensitivity=config.sensitivity or SensitivityConfig(), pruners=())
        _run(config, json, quiet)

    _guarded(action, debug, job)


@app.command(epilog=EPILOG)
def validate(job: Job, set_: Set = None, output: Output = None, debug: Debug = False) -> None:
    """Check a job and say what it will do; starts nothing."""

    def action() -> None:
        from raycompress.driver import validate as check

        plan = check(_load(job, set_, output))
        cost = plan.structure.cost()
        print(f"task    {plan.config.task}")
        print(
            f"model   {type(plan.model).__name__}: {cost.params:,} parameters, {cost.macs:,} MACs"
        )
        print(f"groups  {len(plan.structure.groups)} channel groups can be pruned")
        for trial in plan.trials:
            print(f"trial   {trial.name}")
        print(f"output  {plan.output}")

    _guarded(action, debug, job)


@app.command(epilog=EPILOG)
def report(
    output: Annotated[Path, typer.Argument(help="A job's output folder.")],
    markdown: Annotated[bool, typer.Option(help="Print Markdown.")] = False,
    debug: Debug = False,
) -> None:
    """Print the report of a finished job."""

    def action() -> None:
        from raycompress.errors import ConfigError
        from raycompress.results import JobResult
        from raycompress.tracking.report import report_markdown, report_table

        path = output / "results" / "summary.json"
        if not path.exists():
            raise ConfigError(f"{output} holds no finished job: no file {path}")
        result = JobResult.from_json(path.read_text())
        if markdown:
            print(report_markdown(result))
        else:
            width = None if sys.stdout.isatty() else 200
            Console(width=width).print(report_table(result))

    _guarded(action, debug)


@app.command(epilog=EPILOG)
def ui(
    output: Annotated[Path, typer.Argument(help="A job's output folder.")],
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000,
    debug: Debug = False,
) -> None:
    """Open MLflow's UI for a job's results, on this machine alone."""

    def action() -> None:
        from raycompress.tracking.mlflow import ui_command

        command, environment = ui_command(output.expanduser().absolute(), port)
        print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
        os.execvpe(command[0], command, {**os.environ, **environment})

    _guarded(action, debug)


@app.command(epilog=EPILOG)
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write task.py and job.yaml.")] = Path(
        "."
    ),
    debug: Debug = False,
) -> None:
    """Write a commented task and job that run as they are."""

    def action() -> None:
        from raycompress.errors import ConfigError

        templates = Path(__file__).parent / "templates"
        targets = {name: folder / name for name in ("task.py", "job.yaml")}
        for path in targets.values():
            if path.exists():
                raise ConfigError(f"{path} is there already; init overwrites nothing")
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in targets.items():
            path.write_text((templates / f"{name}.txt").read_text())
            print(f"wrote {path}")
        where = "" if folder == Path(".") else f"cd {folder} && "
        print(f"next:  {where}raycompress run job.yaml")

    _guarded(action, debug)


@app.command(epilog=EPILOG)
def schema() -> None:
    """Print the JSON Schema of job files, for editors."""
    import json as json_module

    from raycompress.schema import json_schema

    print(json_module.dumps(json_schema(), indent=2))
