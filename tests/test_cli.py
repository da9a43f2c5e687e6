"""The command line: what it prints where, exit codes, and how little it imports."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import raycompress
import raycompress.driver
from raycompress.cli import EPILOG, app
from raycompress.errors import (
    EvaluationError,
    InterruptedJob,
    StorageError,
    UnpublishedJob,
)
from raycompress.progress import PlainProgress, TerminalProgress

JOB = """\
name: small
task: raycompress.testing:ToyTask
pruners:
  - {type: L1Filter}
budgets:
  - {macs: 50%}
cluster: {executor: local}
latency: {batch_sizes: [1], repeats: 3}
tracking: {uri: none}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    return ["job.yaml", "--output", str(tmp_path / "out")]


def test_help_version_and_init_load_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom raycompress.cli import EPILOG, app\n"
        "for args in (['--help'], ['run', '--help'], ['--version'], ['init', 'demo']):\n"
        "    done = CliRunner().invoke(app, args)\n"
        "    assert done.exit_code == 0, done.output\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_version_and_exit_codes_are_told():
    assert (
        CliRunner().invoke(app, ["--version"]).output == f"raycompress {raycompress.__version__}\n"
    )
    for command in ([], ["run"], ["validate"], ["materialize"]):
        text = " ".join(CliRunner().invoke(app, [*command, "--help"]).output.split())
        assert "Exit codes: 0 done; 1 the job failed; 2 bad input" in text
        assert "75 stopped, or done while the tracking store was away: the same" in text
        assert "130 Ctrl-C left a submitted job running." in text


def test_the_readme_lists_the_same_exit_codes():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert EPILOG in " ".join(readme.split())


def test_without_a_command_help_is_shown():
    assert "sensitivity" in CliRunner().invoke(app, []).output


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (EvaluationError("all candidates failed"), 1, "error: all candidates failed\n"),
        (InterruptedJob("stopped; go on"), 75, "error: stopped; go on\n"),
        (UnpublishedJob("done; not logged"), 75, "error: done; not logged\n"),
        (StorageError("no space left"), 1, "error: no space left\n"),
        (KeyboardInterrupt(), 75, "error: stopped; the same command starts again\n"),
    ],
)
def test_errors_have_exit_codes(job, monkeypatch, error, code, text):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(raycompress.driver, "run", fail)
    done = CliRunner().invoke(app, ["run", *job])
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", text)


def test_unexpected_errors_keep_their_traceback_off_the_screen(job, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        return 1 / 0

    monkeypatch.setattr(raycompress.driver, "run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = CliRunner().invoke(app, ["run", *job])
    (log,) = tmp_path.glob("raycompress-*.log")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: ZeroDivisionError: division by zero ({__file__}, line ")
    assert done.stderr.endswith(f"; the traceback is in {log}\n")
    assert "Traceback" in log.read_text()
    raised = CliRunner().invoke(app, ["run", *job, "--debug"]).exception
    assert isinstance(raised, ZeroDivisionError)


TALKATIVE = """\
import os
from raycompress.testing import ToyTask
class Talkative(ToyTask):
    def build_model(self):
        print("from Python")
        os.system("echo from below")
        return super().build_model()
"""


def test_what_others_print_is_not_on_stdout(job, tmp_path):
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    command = [sys.executable, "-m", "raycompress", "run", *job, "--json"]
    done = subprocess.run(
        [*command, "--set", "task=talkative:Talkative"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["name"] == "small"
    assert "from Python" in done.stderr and "from below" in done.stderr


def test_json_is_alone_on_stdout(job):
    done = CliRunner().invoke(app, ["run", *job, "--json", "--set", "name=other"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["name"] == "other"
    assert "report:" in done.stderr
    assert "\x1b" not in done.stderr and "\r" not in done.stderr


def test_quiet_shows_results_alone(job):
    done = CliRunner().invoke(app, ["run", *job, "--quiet"])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "report:" in done.stdout


def test_validate_says_what_will_be_done_and_does_nothing(job, tmp_path):
    done = CliRunner().invoke(app, ["validate", *job, "--set", "sensitivity={sparsities: [0.5]}"])
    assert done.exit_code == 0, done.output
    assert "trial   L1Filter-macs50 (keep macs 50%)\n" in done.stdout
    assert "analyse sensitivity at 0.5\n" in done.stdout
    assert not (tmp_path / "out").exists()


def test_inits_quantize_section_is_a_job_that_validates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "task", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert CliRunner().invoke(app, ["init"]).exit_code == 0
    job = tmp_path / "job.yaml"
    before, section = job.read_text().split("# quantize:")
    section, after = section.split("\n\n", 1)
    section = section.replace("\n# ", "\n")
    job.write_text(f"{before}quantize:{section}\n\n{after}")
    done = CliRunner().invoke(app, ["validate", "job.yaml"])
    assert done.exit_code == 0, done.output
    assert "then    PTQ of 3 layers, lowered to onnx\n" in done.stdout
    trained = job.read_text().replace("type: PTQ", "type: QAT").replace("# training", "training")
    job.write_text(trained)
    done = CliRunner().invoke(app, ["validate", "job.yaml"])
    assert done.exit_code == 0, done.output
    assert "then    QAT of 3 layers, lowered to onnx\n" in done.stdout


def test_init_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init", "demo"]).exit_code == 0
    before = {path: path.read_text() for path in (tmp_path / "demo").iterdir()}
    done = CliRunner().invoke(app, ["init", "demo"])
    assert done.exit_code == 2
    assert done.stderr == "error: demo/task.py is there already; init overwrites nothing\n"
    assert {path: path.read_text() for path in (tmp_path / "demo").iterdir()} == before
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["init", "file/demo"])
    assert (done.exit_code, done.stderr) == (
        2,
        "error: file/demo can't be written: Not a directory\n",
    )


def test_report_of_nothing(tmp_path):
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert f"{tmp_path} holds no finished job" in done.stderr


def test_schema_is_json():
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout)["title"] == "raycompress job"


def test_plain_progress_is_lines_with_the_time():
    stream = io.StringIO()
    progress = PlainProgress(stream, every=60)
    progress.stage("Search [a]")
    progress.step("one", 1, 2)
    progress.step("two", 2, 2)  # too soon after the first
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line[9:] for line in lines] == ["Search [a]", "  one 1/2"]
    assert all(line[2] == line[5] == ":" for line in lines)


def test_terminal_progress_shows_text_as_it_is_and_fails_in_red():
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    progress = TerminalProgress(console)
    progress.stage("Search [a]")
    progress.message("kept [/b]")
    progress.stage("Publish")
    try:
        raise RuntimeError
    except RuntimeError:
        progress.close()
    text = console.file.getvalue()
    assert "✓ Search [a]" in text and "kept [/b]" in text and "✗ Publish" in text


def test_analyze_prints_tables_and_exports_them(job, tmp_path):
    done = CliRunner().invoke(app, ["analyze", job[0], "--csv", "tables"])
    assert done.exit_code == 0, done.output
    for text in ("channel groups", "reaches the model's output", "Layers, for one example"):
        assert text in done.stdout
    names = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert names == ["frozen.csv", "groups.csv", "layers.csv", "steps.csv"]
    done = CliRunner().invoke(app, ["analyze", job[0], "--json"])
    tables = json.loads(done.stdout)
    total = tables["layers"][-1]
    assert total["layer"] == "total" and total["flops"] == 2 * total["macs"] > 0
    assert {g["group"] for g in tables["groups"]} == {s["group"] for s in tables["steps"]}
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["analyze", job[0], "--csv", "file"])
    assert (done.exit_code, done.stderr) == (
        2,
        "error: --csv: file can't be written: File exists\n",
    )
