"""Jobs that open one store at the same moment."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from raycompress.tracking.exclusive import alone
from raycompress.tracking.mlflow import MlflowTracker


@pytest.fixture
def uri(tmp_path, migrated):
    (tmp_path / "shared").mkdir()
    shutil.copy(migrated, tmp_path / "shared/mlflow.db")
    return f"sqlite:///{tmp_path}/shared/mlflow.db"


def test_a_second_job_waits_until_the_first_has_opened_the_database(tmp_path):
    uri = f"sqlite:///{tmp_path}/not there/yet/mlflow.db"
    entered, order = threading.Event(), []

    def second():
        entered.set()
        with alone(uri):
            order.append("second")

    with ThreadPoolExecutor(1) as threads:
        with alone(uri):
            later = threads.submit(second)
            assert entered.wait(10)
            with pytest.raises(TimeoutError):
                later.result(timeout=0.2)
            order.append("first")
        later.result(timeout=10)
    assert order == ["first", "second"]


def test_one_that_fails_lets_the_next_in(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ZeroDivisionError), alone(uri):
        _ = 1 / 0
    with alone(uri):
        pass


class Together:
    """A client that finds no experiment before all of them have looked."""

    def __init__(self, client, barrier):
        self._client, self._barrier, self.made = client, barrier, 0

    def __getattr__(self, name):
        return getattr(self._client, name)

    def get_experiment_by_name(self, name):
        found = self._client.get_experiment_by_name(name)
        if found is None:
            self._barrier.wait(30)
        return found

    def create_experiment(self, *arguments, **options):
        made = self._client.create_experiment(*arguments, **options)
        self.made += 1
        return made


def test_an_experiment_that_another_job_makes_meanwhile_is_taken(uri, tmp_path, monkeypatch):
    barrier, clients = threading.Barrier(3), []
    real = mlflow.MlflowClient

    def together(**options):
        clients.append(Together(real(**options), barrier))
        return clients[-1]

    # As with a server, where nothing keeps them apart.
    monkeypatch.setattr("raycompress.tracking.mlflow.mlflow.MlflowClient", together)
    monkeypatch.setattr("raycompress.tracking.mlflow.alone", lambda uri: nullcontext())

    def start(key):
        tracker = MlflowTracker.start(
            uri=uri, experiment=None, output=tmp_path / key, job_name="same", job_key=key
        )
        child = tracker.child("trial")
        for step in range(3):
            child.log_metrics({"best_loss": len(key) + step}, step)
        tracker.finish("FINISHED")
        return tracker, child

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(start, ["a", "bb", "ccc"]))
    assert sorted(client.made for client in clients) == [0, 0, 1]
    client = real(tracking_uri=uri)
    (own,) = {client.get_run(t.run_id).info.experiment_id for pair in found for t in pair}
    assert len(client.search_runs([own])) == 6
    for length, (tracker, child) in enumerate(found, start=1):
        data = client.get_run(child.run_id).data
        assert data.tags["mlflow.parentRunId"] == tracker.run_id
        history = client.get_metric_history(child.run_id, "best_loss")
        assert [(m.step, m.value) for m in history] == [(s, length + s) for s in range(3)]


def test_what_else_the_store_refuses_of_an_experiment_is_said(uri, monkeypatch):
    from raycompress.tracking.mlflow import _make_experiment

    client = mlflow.MlflowClient(tracking_uri=uri)
    with pytest.raises(MlflowException, match="Invalid experiment name"):
        _make_experiment(client, "", None)
