"""Nothing that a job reads can run code, leave its output, or tell its secrets."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raycompress.driver import run
from raycompress.errors import ConfigError, InputError, VerificationError
from raycompress.hiding import hidden
from raycompress.importing import resolve
from raycompress.loading import build_pruner, load_job, parse_job
from raycompress.plain import from_plain

ROOT = Path(__file__).parent.parent
JOB = {
    "name": "safe",
    "task": "raycompress.testing:ToyTask",
    "pruners": [{"type": "L1Filter"}],
    "budgets": [{"macs": "50%"}],
    "latency": {"batch_sizes": [1], "repeats": 2},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}
SECRET = "hunter2-very-secret"


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_code_unpickles_or_evaluates():
    banned = re.compile(
        r"(pickle|cloudpickle|dill|joblib|shelve|marshal)\.\w*loads?$|^(eval|exec)$"
        r"|yaml\.(load|load_all|unsafe_load|full_load|unsafe_load_all)$|np\.load$|numpy\.load$"
    )
    found = []
    for path in sorted((ROOT / "raycompress").rglob("*.py")):
        if path.name == "testing.py":  # round trips of its own objects
            continue
        for name, keywords in calls(ast.parse(path.read_text())):
            if banned.search(name) or (
                name == "torch.load" and keywords.get("weights_only") != "True"
            ):
                found.append(f"{path.name}: {name}")
    assert found == []


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_weights_that_would_run_code_are_refused(suffix, tmp_path):
    weights, trace = tmp_path / f"w{suffix}", tmp_path / "was run"
    torch.save({"a": Payload(trace)}, weights)
    job = {**JOB, "model": {"weights": str(weights)}, "output": str(tmp_path / "o")}
    with pytest.raises(ConfigError, match="run code when it is loaded"):
        run(job)
    assert not trace.exists()
    with weights.open("rb"), pytest.raises(FileExistsError):  # the attack is a real one
        trace.mkdir()
        torch.load(weights, weights_only=False)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ['was run']",
        "!!python/object/new:os.system ['mkdir \"was run\"']",
        "!!python/name:os.system",
        "!include other.yaml",
    ],
)
def test_yaml_makes_plain_data_alone(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(f"name: x\ntask: {value}\n")
    with pytest.raises(ConfigError):
        load_job("job.yaml")
    with pytest.raises(ConfigError):
        load_job("job.yaml", [f"task={value}"])
    assert not Path("was run").exists()


@pytest.mark.parametrize(
    "path", ["os:system", "subprocess:Popen", "raycompress.driver:run", "builtins:exec"]
)
def test_import_paths_name_subclasses_alone(path, tmp_path):
    from raycompress.collect import Collector
    from raycompress.criteria import Criterion
    from raycompress.method import TrainingMethod
    from raycompress.pruning import Pruner
    from raycompress.task import Task

    for base in (Task, Pruner, Criterion, TrainingMethod, Collector):
        with pytest.raises(ConfigError, match="must be a subclass of"):
            resolve(path, base)
    with pytest.raises(ConfigError, match="must be a subclass of"):
        from_plain({"type": path, "args": "x"}, TrainingMethod)
    with pytest.raises(InputError, match="must be a subclass of"):
        build_pruner({"type": path})
    with pytest.raises(InputError, match="must be a subclass of"):
        run({**JOB, "pruners": [{"type": "OneShot", "criterion": path}], "output": str(tmp_path)})


@pytest.mark.parametrize(
    "name", ["..", ".", "../x", "/etc/x", "a/b", "a\\b", "a\nb", "a\0b", " ", "x" * 101, ".hidden"]
)
def test_names_cant_leave_the_output(name):
    with pytest.raises(ConfigError, match="must be usable as a folder's name"):
        parse_job({**JOB, "name": name})


@pytest.mark.parametrize("name", ["../x", "a/b", "models:/x", "", " "])
def test_registered_models_have_plain_names(name):
    with pytest.raises(ConfigError, match=r"tracking.registered_model must be a name"):
        parse_job({**JOB, "tracking": {"registered_model": name}})


def test_everything_is_written_below_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    names = ["L1Filter", "FPGM", "L1Filter"]
    job = {**JOB, "pruners": [{"type": name} for name in names], "output": str(tmp_path / "out")}
    result = run(job)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for trial in result.trials:
        assert re.fullmatch(r"[\w.-]+", trial.name) and not trial.name.startswith(".")


def test_secrets_are_hidden():
    value = {
        "uri": f"postgresql://me:{SECRET}@h/db",
        "api_key": SECRET,
        "nested": [{"hub_token": SECRET, "num_tokens": 7, "token_dim": 3, "max_token": "512"}],
        "password": None,
    }
    assert hidden(value) == {
        "uri": "postgresql://me:***@h/db",
        "api_key": "***",
        "nested": [{"hub_token": "***", "num_tokens": 7, "token_dim": 3, "max_token": "512"}],
        "password": None,
    }


TASK = """\
from raycompress.testing import ToyTask


class Secretive(ToyTask):
    def __init__(self, hub_token="", url="", depth=0):
        super().__init__()
        if depth:
            raise ValueError("no such depth")
"""


def test_secrets_are_neither_kept_nor_logged_nor_printed(tmp_path, monkeypatch):
    (tmp_path / "secretive.py").write_text(TASK)
    arguments = {"hub_token": SECRET, "url": f"https://me:{SECRET}@host/data"}
    job = {**JOB, "task": "secretive:Secretive", "task_args": arguments, "tracking": {}}
    (tmp_path / "job.json").write_text(json.dumps({**job, "output": str(tmp_path / "o")}))

    def call(*options):
        return subprocess.run(
            [sys.executable, "-m", "raycompress", "run", "job.json", *options],
            cwd=tmp_path,
            capture_output=True,
        )

    done = call()
    assert done.returncode == 0, done.stderr.decode()
    again = call()  # what was hidden isn't taken for a change
    assert again.returncode == 0, again.stderr.decode()
    printed = done.stdout + done.stderr + again.stdout + again.stderr
    for options in (["--set", "task_args.depth=3"], ["--set", "task_args.depth=3", "--debug"]):
        failed = call(*options)
        assert failed.returncode != 0 and b"no such depth" in failed.stderr
        printed += failed.stdout + failed.stderr
    assert SECRET.encode() not in printed
    holding = [
        p for p in (tmp_path / "o").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()
    ]
    assert holding == []
    assert b"***" in (tmp_path / "o/job.yaml").read_bytes()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_tracking_password_is_never_printed(scheme, debug, tmp_path):
    (tmp_path / "job.yaml").write_text(
        "name: x\ntask: raycompress.testing:ToyTask\npruners: [{type: L1Filter, sparsity: 0.5}]\n"
        f"tracking: {{uri: '{scheme}://me:{SECRET}@127.0.0.1:9/db'}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "raycompress", "run", "job.yaml", "--output", "o"]
        + ["--debug"] * debug,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "***@127.0.0.1:9" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_what_a_tracking_store_gives_back_is_never_loaded(tmp_path, monkeypatch):
    from raycompress.testing import ToyNet
    from raycompress.tracking.mlflow import MlflowTracker

    run = MlflowTracker.start(
        uri=None, experiment=None, output=tmp_path, job_name="demo", job_key="k"
    )
    send, trace = run._client.log_model_artifacts, tmp_path / "was run"

    def tampered(model_id, folder):
        send(model_id, folder)
        for path in (tmp_path / "artifacts").rglob("*"):
            if path.is_file() and path.suffix in (".pt2", ".pth", ".pkl"):
                path.write_bytes(pickle.dumps(Payload(trace)))

    monkeypatch.setattr(run._client, "log_model_artifacts", tampered)
    with pytest.raises(VerificationError, match=r"gives back another data.model.pt2"):
        run.log_model(ToyNet().eval(), (torch.randn(2, 2, 6, 6),))
    assert not trace.exists()


def test_servers_that_we_start_listen_on_loopback(tmp_path):
    from raycompress.tracking.ui import ui_command

    (tmp_path / "mlflow.db").touch()
    command, _ = ui_command(tmp_path, 5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    text = (ROOT / "raycompress/distributed/cluster.py").read_text()
    options = [k for name, k in calls(ast.parse(text)) if name == "ray.init"]
    assert len(options) == 1 and '"include_dashboard": False' in text
    assert "dashboard_host" not in text
