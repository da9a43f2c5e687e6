import os
import shutil
import socket
import subprocess
import sys
import time

import mlflow
import pytest
import torch
from torch import nn

import raycompress
from raycompress.errors import RaycompressError, TrackingError, VerificationError
from raycompress.testing import ToyNet
from raycompress.tracking.address import check, masked_uri
from raycompress.tracking.mlflow import MlflowTracker
from raycompress.tracking.ui import ui_command

EXAMPLE = (torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)),)


def start(output, uri=None, key="job-1", **options):
    return MlflowTracker.start(
        uri=uri, experiment=None, output=output, job_name="demo", job_key=key, **options
    )


@pytest.fixture
def output(tmp_path, migrated):
    folder = tmp_path / "out put"  # paths with spaces are paths
    folder.mkdir()
    shutil.copy(migrated, folder / "mlflow.db")
    return folder


@pytest.fixture
def client(output):
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")


def test_a_continued_job_continues_its_runs_and_logs_no_step_twice(output, client):
    first = start(output)
    child = first.child("L1-macs50")
    for step in range(3):
        child.log_metrics({"loss": 1.0 - step / 10}, step)
    first.finish("KILLED")
    assert client.get_run(child.run_id).info.status == "KILLED", "open children end with the job"

    second = start(output)
    again = second.child("L1-macs50")
    assert (second.run_id, again.run_id) == (first.run_id, child.run_id)
    assert client.get_run(again.run_id).info.status == "RUNNING"
    for step in range(5):
        again.log_metrics({"loss": 1.0 - step / 10}, step)
    assert [m.step for m in client.get_metric_history(again.run_id, "loss")] == list(range(5))
    again.finish("FINISHED")
    second.finish("FAILED")
    assert client.get_run(again.run_id).info.status == "FINISHED"
    assert client.get_run(again.run_id).data.tags["mlflow.parentRunId"] == second.run_id
    assert start(output, key="job-2").run_id != first.run_id


def test_names_and_values_that_mlflow_refuses_are_made_fit(output, client):
    run = start(output)
    run.log_metrics({"layers[0]//w": 1.0, "x" * 300: 2.0, "bad": float("-inf")}, 0)
    found = client.get_run(run.run_id).data.metrics
    assert found["layers_0_/w"] == 1.0 and len(found) == 2
    run.log_metrics({f"m{i}": float(i) for i in range(1500)})
    run.log_params({"a": 1, **{f"p{i}": i for i in range(150)}})
    run.log_params({"a": 2, "long": "y" * 9000})
    data = client.get_run(run.run_id).data
    assert data.params["a"] == "1" and len(data.params["long"]) == 6000 and len(data.params) == 152
    assert len(data.metrics) == 1502


def test_files_stay_with_the_store_whatever_the_current_folder(tmp_path, output, monkeypatch):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    note = tmp_path / "note.txt"
    note.write_text("x")
    shutil.copy(output / "mlflow.db", tmp_path / "own/mlflow.db")
    for place, uri in ((output, None), (tmp_path / "own", f"sqlite:///{tmp_path}/own/mlflow.db")):
        start(output, uri).log_artifact(note, "notes")
        assert len(list((place / "artifacts").rglob("notes/note.txt"))) == 1
    assert not list((tmp_path / "cwd").iterdir())


def test_the_model_loads_in_another_process_at_another_batch_size(output, client, monkeypatch):
    run = start(output)
    model = ToyNet().eval()
    before = mlflow.get_tracking_uri()
    uri = run.log_model(model, (EXAMPLE[0][:1],), "toy")  # one example: the batch is free anyway
    assert mlflow.get_tracking_uri() == before and mlflow.active_run() is None
    code = (
        "import sys, mlflow.pytorch, torch;"
        "mlflow.set_tracking_uri(sys.argv[1]);"
        "model = mlflow.pytorch.load_model(sys.argv[2]);"
        "torch.save(model(torch.ones(7, 2, 6, 6)).detach(), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{output}/mlflow.db", uri, output / "y.pt"]
    # Refuses every archive that would unpickle something.
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    subprocess.run(command, check=True, timeout=120)
    got = torch.load(output / "y.pt", weights_only=True)
    torch.testing.assert_close(got, model(torch.ones(7, 2, 6, 6)).detach())
    assert client.get_run(run.run_id).info.status == "RUNNING"
    # The same file is a program for `load`, which doesn't read its pickled example inputs.
    (program,) = (output / "artifacts").rglob("model.pt2")
    torch.testing.assert_close(raycompress.load(program)(torch.ones(7, 2, 6, 6)), got)

    # A continued job keeps and registers the same weights once.
    assert start(output).log_model(model, EXAMPLE, "toy") == uri
    assert len(client.search_model_versions("name='toy'")) == 1
    assert run.log_model(ToyNet().eval(), EXAMPLE, "toy") != uri
    assert len(client.search_model_versions("name='toy'")) == 2


class Sum(nn.Module):
    def forward(self, a, b):
        return {"sum": a + b, "mean": (a + b).mean(1)}


class Baked(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Sized(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[0] == 2 else x - 1


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_models_of_several_inputs_and_models_that_cannot_be_exported(output):
    run = start(output)
    mlflow.set_tracking_uri(f"sqlite:///{output}/mlflow.db")
    try:
        uri = run.log_model(Sum(), (torch.randn(2, 3), torch.randn(2, 3)))
        loaded = mlflow.pytorch.load_model(uri)
    finally:
        mlflow.set_tracking_uri(None)
    assert loaded(torch.ones(5, 3), torch.ones(5, 3))["mean"].tolist() == [2.0] * 5
    assert run.log_model(Baked(), (torch.randn(2, 3),))
    with pytest.raises(VerificationError, match="doesn't run with 5 examples"):
        run.log_model(Sized(), (torch.randn(2, 3),))
    with pytest.raises(RaycompressError, match=r"torch\.export can't export Branch"):
        run.log_model(Branch(), (torch.randn(2, 3),))


def test_passwords_are_masked():
    assert masked_uri("http://me:p@ss/w@host:5000/x") == "http://me:***@host:5000/x"
    assert (
        masked_uri("mysql://h/db?user=a&password=b&x=1") == "mysql://h/db?user=a&password=***&x=1"
    )
    assert masked_uri("http://host:5000") == "http://host:5000"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://me:secret@127.0.0.1:9", "no MLflow server answers at http://me:***@127.0.0.1:9"),
        ("http://127.0.0.1:99999", "Port out of range 0-65535: http://127.0.0.1:99999"),
        ("postgresql://me:secret@127.0.0.1:9/db", "no database answers at postgresql://me:***@"),
        ("sqlite:///mlflow.db", "is relative to the current folder"),
        ("./mlruns", "MLflow keeps no runs in plain folders any more"),
    ],
)
def test_an_unusable_store_is_named_at_once(uri, message):
    before = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        check(uri)
    assert message in str(caught.value) and "secret" not in str(caught.value)
    assert "\n" not in str(caught.value) and time.monotonic() - before < 3


def test_a_server_that_never_answers_is_given_up_on():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TrackingError, match="timed out"):
            check(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.slow
def test_a_real_server(output, tmp_path, capfd):
    command, environment = ui_command(output)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command[command.index("--port") + 1] = str(port)
    command += ["--artifacts-destination", str(tmp_path / "served"), "--serve-artifacts"]
    command[command.index("--default-artifact-root") + 1] = "mlflow-artifacts:/"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, cwd=tmp_path
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                check(uri)
                break
            except TrackingError:
                time.sleep(1)
        run = start(tmp_path / "elsewhere", uri)
        child = run.child("trial")
        child.log_metrics({"loss": 0.5}, 0)
        address = child.log_model(ToyNet().eval(), EXAMPLE, "served")
        child.finish("FINISHED")
        run.finish("FINISHED")
        client = mlflow.MlflowClient(tracking_uri=uri)
        assert client.get_run(child.run_id).data.metrics == {"loss": 0.5}
        (version,) = client.search_model_versions("name='served'")
        assert version.run_id == child.run_id and address.startswith("models:/m-")
        assert list((tmp_path / "served").rglob("model.pt2"))
        assert "View run" not in capfd.readouterr().out, "stdout is for JSON"
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_a_deleted_experiment_is_explained(output, client):
    run = start(output)
    client.delete_experiment(client.get_run(run.run_id).info.experiment_id)
    with pytest.raises(TrackingError, match=r"experiment 'demo' is deleted; restore it"):
        start(output)
