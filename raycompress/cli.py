"""The command line. Its exit codes are in `EPILOG`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from raycompress import __version__, remote
from raycompress.errors import ConfigError, InputError
from raycompress.signals import ignore, terminable
from raycompress.terminal import guarded, nothing_on_stdout

if TYPE_CHECKING:
    from raycompress.config import JobConfig
    from raycompress.results import JobResult
    from raycompress.source import Source

__all__ = ["app", "main"]

EPILOG = (
    "Exit codes: 0 done; 1 the job failed; 2 bad input, nothing was started; "
    "75 stopped, or done while the tracking store was away: the same command continues; "
    "130 Ctrl-C left a submitted job running."
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
    str | None, typer.Option("--output", help="Folder or URI of everything that the job writes.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]
Changed = Annotated[
    bool, typer.Option("--changed", help="Go on in an output that holds other settings.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def main() -> None:
    """Entry point; whenever a signal comes, a command ends with its own code and no traceback."""
    try:
        with terminable():
            app()
    except SystemExit:
        ignore()
        raise


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"raycompress {__version__}")
        raise typer.Exit


def _with_job(
    action: Callable[[JobConfig], None],
    job: Path,
    overrides: list[str] | None,
    output: str | None,
    debug: bool,
) -> None:
    """Loads a job and acts on it; what is wrong with it later has its line too."""

    def loaded() -> None:
        from raycompress.loading import load_source

        config, source = load_source(job, overrides or (), output)
        try:
            action(config)
        except InputError as error:
            raise _located(error, source) from error

    guarded(loaded, debug)


def _located(error: InputError, source: Source) -> InputError:
    return type(error)("\n".join(source.located(line) for line in str(error).splitlines()))


def _samples(result: JobResult, study: str) -> str:
    """One line on a study."""
    rows = [row for row in result.samples if row.study == study]
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    best = ", ".join(row.name for row in rows if row.best)
    return f"{study}: {len(rows)} samples ({counts}); best: {best}"


def _run(config: JobConfig, json: bool, quiet: bool, changed: bool) -> None:
    from raycompress.driver import run
    from raycompress.progress import progress_for
    from raycompress.storage import place_of
    from raycompress.tracking.quantized_report import latency_note
    from raycompress.tracking.report import tables

    progress = progress_for(quiet)
    with nothing_on_stdout():
        result = run(config, progress=progress, changed=changed)
    console = Console(stderr=json, width=None if sys.stdout.isatty() else 200)
    for table in tables(result):
        console.print(table)
    for trial in result.trials:
        if trial.failure is not None:
            console.print(f"{trial.name} failed: {trial.failure}", highlight=False, markup=False)
        if trial.stopped is not None:
            console.print(f"{trial.name} was stopped after step {trial.stopped}", highlight=False)
        if trial.verification is not None:
            console.print(
                f"{trial.name}: slim against masked is {trial.verification.kind} "
                f"(relative error {trial.verification.max_error:.1e})",
                highlight=False,
            )
        for note in latency_note(trial):
            console.print(note, highlight=False, markup=False)
    for study in dict.fromkeys(row.study for row in result.samples):
        console.print(_samples(result, study), highlight=False, markup=False)
    if result.model_uri:
        console.print(f"model:  {result.model_uri}", highlight=False, soft_wrap=True)
    place = place_of(result.output)
    report = place / "results" / "report.md"
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    if result.tracking_uri:
        look = f"raycompress ui {place}" if isinstance(place, Path) else result.tracking_uri
        console.print(f"look:   {look}", highlight=False, soft_wrap=True)
    if json:
        print(result.to_json())


@app.command(epilog=EPILOG)
def run(
    job: Job,
    set_: Set = None,
    output: Output = None,
    json: Json = False,
    quiet: Quiet = False,
    changed: Changed = False,
    debug: Debug = False,
) -> None:
    """Run a job; the same command continues one that was stopped."""
    _with_job(lambda config: _run(config, json, quiet, changed), job, set_, output, debug)


@app.command(epilog=EPILOG)
def sensitivity(
    job: Job,
    set_: Set = None,
    output: Output = None,
    json: Json = False,
    quiet: Quiet = False,
    changed: Changed = False,
    debug: Debug = False,
) -> None:
    """Run a job's sensitivity analysis alone."""

    def action(config: JobConfig) -> None:
        from dataclasses import replace

        from raycompress.config import SensitivityConfig

        sensitivity = config.sensitivity or SensitivityConfig()
        config = replace(config, sensitivity=sensitivity, pruners=(), tune=None, quantize=None)
        _run(config, json, quiet, changed)

    _with_job(action, job, set_, output, debug)


@app.command(epilog=EPILOG)
def validate(job: Job, set_: Set = None, output: Output = None, debug: Debug = False) -> None:
    """Check a job and say what it will do; starts nothing."""

    def action(config: JobConfig) -> None:
        from raycompress.driver import validate as check

        plan = check(config)
        cost = plan.structure.cost()
        print(f"task    {plan.config.task}")
        print(
            f"model   {type(plan.model).__name__}: {cost.params:,} parameters, {cost.macs:,} MACs"
        )
        print(f"groups  {len(plan.structure.groups)} channel groups can be pruned")
        if plan.sensitivity is not None:
            sparsities = ", ".join(f"{s:g}" for s in plan.sensitivity.sparsities)
            print(f"analyse sensitivity at {sparsities}")
        for trial in plan.trials:
            budget = "" if trial.budget is None else f" (keep {trial.budget})"
            print(f"trial   {trial.name}{budget}")
        for study in plan.studies:
            budget = "" if study.budget is None else f" (keep {study.budget})"
            print(f"study   {study.name}{budget}: {study.describe()}")
        if (quantize := plan.quantize) is not None:
            num = len(quantize.how.choices)
            print(f"then    {quantize.name} of {num} layers, lowered to {quantize.section.lower}")
            if quantize.floats:
                print(f"        in float: {', '.join(quantize.floats)}")
        print(f"output  {plan.output}")

    _with_job(action, job, set_, output, debug)


@app.command(epilog=EPILOG)
def analyze(
    job: Job,
    set_: Set = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Folder to write each table to, as CSV.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead.")] = False,
    debug: Debug = False,
) -> None:
    """Show what of a job's model can be pruned, what can't and why, and each layer's cost."""

    def make_folder() -> None:
        if csv is not None:
            try:
                csv.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--csv: {csv} can't be written: {error.strerror}") from error

    def action(config: JobConfig) -> None:
        from raycompress.driver import validate as check
        from raycompress.structure.tables import overview, to_csv, to_plain, topology

        with nothing_on_stdout():
            structure = check(config).structure
        tables = topology(structure)
        if csv is not None:
            for name, rows in tables.items():
                if rows:
                    to_csv(rows, csv / f"{name}.csv")
        if json:
            import json as json_module

            plain: dict[str, object] = {name: to_plain(rows) for name, rows in tables.items()}
            plain["unknown_ops"], plain["untouched"] = structure.unknown_ops, structure.untouched
            print(json_module.dumps(plain, indent=1))
            return
        console = Console(width=None if sys.stdout.isatty() else 200)
        for part in overview(structure, console.width):
            console.print(part)

    guarded(make_folder, debug)
    _with_job(action, job, set_, None, debug)


@app.command(epilog=EPILOG)
def report(
    output: Annotated[str, typer.Argument(help="A job's output: a folder, or its URI.")],
    markdown: Annotated[bool, typer.Option(help="Print Markdown.")] = False,
    debug: Debug = False,
) -> None:
    """Print the report of a finished job."""

    def action() -> None:
        from raycompress.results import JobResult
        from raycompress.storage import place_of
        from raycompress.tracking.report import report_markdown, tables

        path = place_of(output) / "results" / "summary.json"
        if not path.exists():
            raise ConfigError(f"{output} holds no finished job: no file {path}")
        result = JobResult.from_json(path.read_text())
        if markdown:
            print(report_markdown(result))
        else:
            width = None if sys.stdout.isatty() else 200
            console = Console(width=width)
            for table in tables(result):
                console.print(table)

    guarded(action, debug)


@app.command(epilog=EPILOG)
def materialize(
    job: Annotated[str, typer.Argument(help="A job file (YAML), or a job's output.")],
    point: Annotated[
        str, typer.Option("--point", help="Its id, or the id's first characters; see the report.")
    ],
    trial: Annotated[
        str | None, typer.Option("--trial", help="Of this trial, where several have the point.")
    ] = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="Fine-tune it, as the job says under `recover`.")
    ] = False,
    quantize: Annotated[
        bool,
        typer.Option(
            "--quantize",
            help="Quantize it, as the job says under `quantize`; one with bits is anyway.",
        ),
    ] = False,
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a verified model of any point that a finished job evaluated; searches nothing."""

    def action() -> None:
        from raycompress.materialization import materialize as build
        from raycompress.progress import progress_for
        from raycompress.tracking.report import models_table

        progress = progress_for(quiet)
        with nothing_on_stdout():
            done = build(
                job,
                point,
                trial=trial,
                recover=recover,
                quantize=quantize,
                overrides=set_ or (),
                progress=progress,
            )
        console = Console(stderr=json, width=None if sys.stdout.isatty() else 200)
        title = f"{done.point.id} of {done.point.trial or 'the dense model'}"
        console.print(models_table(title, done.score_name, done.rows))
        lines = [f"searched with: {done.score_name} {done.point.score:.4f} on validation data"]
        if done.verification is not None:
            kind, error = done.verification.kind, done.verification.max_error
            lines.append(f"slim against masked: {kind} (relative error {error:.1e})")
        lines += [f"note: {note}" for note in done.notes]
        lines += [f"model: {path}" for path in done.models]
        if (made := done.quantized) is not None:
            where = f"on {made.backend}, in {made.runs}" if made.backend else "in simulation"
            file = made.file or made.folder
            lines.append(f"quantized: {made.quantizer} {made.bits}, {where}: {file}")
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if json:
            print(done.to_json())

    guarded(action, debug)


@app.command(epilog=EPILOG)
def ui(
    output: Annotated[Path, typer.Argument(help="A job's output folder.")],
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000,
    debug: Debug = False,
) -> None:
    """Open MLflow's UI for a job's results, on this machine alone."""

    def action() -> None:
        from raycompress.tracking.ui import ui_command

        command, environment = ui_command(output.expanduser().absolute(), port)
        print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
        os.execvpe(command[0], command, {**os.environ, **environment})

    guarded(action, debug)


@app.command(epilog=EPILOG)
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write task.py and job.yaml.")] = Path(
        "."
    ),
    debug: Debug = False,
) -> None:
    """Write a commented task and job that run as they are."""

    def action() -> None:
        templates = Path(__file__).parent / "templates"
        targets = {name: folder / name for name in ("task.py", "job.yaml")}
        for path in targets.values():
            if path.exists():
                raise ConfigError(f"{path} is there already; init overwrites nothing")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, path in targets.items():
                path.write_text((templates / f"{name}.txt").read_text())
                print(f"wrote {path}")
        except OSError as error:
            raise ConfigError(f"{folder} can't be written: {error.strerror}") from error
        where = "" if folder == Path(".") else f"cd {folder} && "
        print(f"next:  {where}raycompress run job.yaml")

    guarded(action, debug)


@app.command(epilog=EPILOG)
def schema() -> None:
    """Print the JSON Schema of job files, for editors."""
    import json as json_module

    from raycompress.schema import json_schema

    print(json_module.dumps(json_schema(), indent=2))


for _command in (remote.submit, remote.status, remote.stop):
    app.command(epilog=EPILOG)(_command)
