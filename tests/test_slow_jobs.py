"""Jobs on real Ray: killed drivers, submission, and the results in a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from raycompress.ledger import read_ledger
from raycompress.results import JobResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent
JOB = """\
name: chaos
task: jobs.tasks.digits:Digits
task_args: {width: 16}
pruners:
  - {type: SimulatedAnnealing, iterations: 80, neighbours: 4, recalibrate: 2}
budgets:
  - {macs: 40%}
latency: {batch_sizes: [1], repeats: 3}
cluster: {replicas: 2}
tracking: {uri: none}
"""
BRAKED = """\
import time
from pathlib import Path

from jobs.tasks.digits import Digits


class Braked(Digits):
    def __init__(self, width, brake):
        super().__init__(width)
        self.brake = Path(brake)

    def forward(self, model, batch):
        if self.brake.exists():
            time.sleep(1.0)
        return super().forward(model, batch)
"""


def raycompress(*arguments, cwd=ROOT, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "raycompress", *arguments], cwd=cwd, text=True, **options
    )


def finish(*arguments):
    done = raycompress(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    return out


def wait_for(what, seconds=240):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def keys_and_scores(output):
    records = [r for r in read_ledger(output / "ledger")]
    assert len({r["key"] for r in records}) == len(records), "something was evaluated twice"
    return {r["key"]: r["shards"] for r in records}


def num_candidates(output):
    """Looked at so far; a race leaves several records of one."""
    asked = [dict(record["candidate"]) for record in read_ledger(output / "ledger")]
    for candidate in asked:
        candidate.pop("shards", None)
    return len({json.dumps(candidate, sort_keys=True) for candidate in asked})


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_driver_continues_and_finds_the_same(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB.replace("iterations: 80", "iterations: 40"))
    job = str(tmp_path / "job.yaml")
    whole = tmp_path / "whole"
    finish("run", job, "--output", str(whole), "--set", "cluster.executor=local")
    part = tmp_path / "killed" / "ledger" / "SimulatedAnnealing-macs40.jsonl"
    counts = []
    for _ in range(2):
        before = num_lines(part)
        driver = raycompress("run", job, "--output", str(tmp_path / "killed"), "--quiet")
        wait_for(lambda before=before: num_lines(part) >= before + 20)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        counts.append(num_lines(part))
    evaluated = num_candidates(tmp_path / "killed")
    assert counts[-1] < num_lines(whole / "ledger" / part.name), "killed too late to prove anything"
    out = finish("run", job, "--output", str(tmp_path / "killed"), "--json")
    assert keys_and_scores(tmp_path / "killed") == keys_and_scores(whole)
    result = JobResult.from_json(out)
    expected = JobResult.from_json((whole / "results/summary.json").read_text())
    assert result.trials[0].counts == expected.trials[0].counts
    assert result.trials[0].weights == expected.trials[0].weights
    assert result.trials[0].replayed >= evaluated - 8


def test_stopped_job_says_that_it_can_be_continued(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    part = tmp_path / "out" / "ledger" / "SimulatedAnnealing-macs40.jsonl"
    driver = raycompress(
        *("run", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "out")),
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: num_lines(part) >= 20)
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 75
    assert "the same command continues" in err and "Traceback" not in err


def test_sigterm_while_the_dense_model_trains_ends_the_run_as_killed(tmp_path):
    job = JOB.replace("tracking: {uri: none}", "model: {pretrain: {epochs: 5000}}")
    (tmp_path / "job.yaml").write_text(job)
    driver = raycompress(
        *("run", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "out")),
        stderr=subprocess.PIPE,
    )
    for line in driver.stderr:
        if "loss" in line:  # a replica trains
            break
    driver.send_signal(signal.SIGTERM)
    err = driver.stderr.read()
    assert driver.wait(timeout=60) == 75
    assert "the same command continues" in err and "Traceback" not in err
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/out/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.status for run in runs} == {"KILLED"} and len(runs) == 2


@contextmanager
def running_head(**variables):
    """A local head with its dashboard, in a session of its own so that it alone is stopped."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", **variables}
    ray = str(Path(sys.executable).parent / "ray")
    process = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=4", "--dashboard-host=127.0.0.1"],
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def up():
        try:
            urllib.request.urlopen("http://127.0.0.1:8265/api/version", timeout=2).read()
        except urllib.error.HTTPError:
            return True  # it wants a token
        except OSError:
            return False
        return True

    try:
        wait_for(up)
        yield ray, env
    finally:
        children = subprocess.run(
            ["ps", "-o", "pid=", "--sid", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        for pid in children:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


@pytest.fixture
def head():
    with running_head(RAY_AUTH_MODE="disabled") as found:
        yield found


@pytest.fixture
def guarded_head(tmp_path):
    (tmp_path / "token").write_text("a-token-of-thirty-two-characters")
    with running_head(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"), HOME=str(tmp_path)
    ) as found:
        yield found


def test_submit_follow_stop_and_resume_on_a_cluster_with_a_token(tmp_path, guarded_head):
    _, env = guarded_head
    without = {k: v for k, v in env.items() if not k.startswith("RAY_AUTH")}
    elsewhere = {**without, "HOME": str(tmp_path / "none")}
    asked = raycompress("status", env=elsewhere, stderr=subprocess.PIPE)
    _, err = asked.communicate(timeout=60)
    assert asked.returncode == 2 and "the cluster wants its token: set RAY_AUTH_MODE=token" in err
    # The token's path alone is enough: Ray would send none without RAY_AUTH_MODE.
    env = {**without, "RAY_AUTH_TOKEN_PATH": env["RAY_AUTH_TOKEN_PATH"]}

    folder, output, brake = tmp_path / "code", tmp_path / "out", tmp_path / "brake"

    def call(*arguments):
        done = raycompress(
            *arguments, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = done.communicate(timeout=300)
        return done.returncode, out, err

    for package in ("jobs", "raycompress"):
        shutil.copytree(ROOT / package, folder / package)
    (folder / "braked.py").write_text(BRAKED)
    job = JOB.replace("jobs.tasks.digits:Digits", "braked:Braked")
    job = job.replace("width: 16", f"width: 16, brake: {brake}")
    (folder / "x.yaml").write_text(job.replace("iterations: 80", "iterations: 40"))
    where = ("--working-dir", str(folder), "--output", str(output))
    first = raycompress(
        *("submit", str(folder / "x.yaml"), *where),
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    part = output / "ledger" / "SimulatedAnnealing-macs40.jsonl"
    wait_for(lambda: num_lines(part) >= 20)
    brake.touch()  # so that it still runs when it is stopped
    code, out, _ = call("status", "chaos")
    assert code == 0 and out.startswith("chaos-1  running")
    code, _, err = call("submit", str(folder / "x.yaml"), *where)
    assert code == 2 and "job 'chaos' is running as chaos-1" in err
    code, _, err = call("stop", "chaos")
    assert code == 0 and f"stopped; what was finished is in {output}" in err
    assert "submit --resume chaos" in err
    out, err = first.communicate(timeout=60)
    assert first.returncode == 75 and "chaos-1 was stopped; continue with" in err
    assert "Search: SimulatedAnnealing-macs40" in out  # it was followed
    finished = num_candidates(output)
    assert not (output / "results" / "summary.json").exists()

    brake.unlink()
    code, out, err = call("submit", "--resume", "chaos")
    assert code == 0, out + err
    assert "chaos-2 is done" in err and "finished units of work are in" in out
    result = JobResult.from_json((output / "results/summary.json").read_text())
    assert result.trials[0].replayed >= finished - 8
    code, out, _ = call("status")
    assert out.startswith("chaos-2  succeeded") and len(out.splitlines()) == 1
    code, out, _ = call("submit", str(folder / "x.yaml"), *where, "--set", "seed=9")
    assert code == 2 and "seed was 0, now 9" in out  # the driver's own exit code
    assert "exit code 2" in call("status", "chaos")[1]


def test_submitted_job_leaves_its_results_outside_of_its_working_dir(tmp_path, head):
    ray, env = head
    output = tmp_path / "out"
    done = subprocess.run(
        [
            *(ray, "job", "submit", "--address", "http://127.0.0.1:8265"),
            *("--working-dir", ".", "--", sys.executable, "-m", "raycompress", "run"),
            *("jobs/quickstart.yaml", "--output", str(output)),
            *("--set", "pruners.0.iterations=3", "--set", "model.pretrain.epochs=2"),
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = JobResult.from_json((output / "results/summary.json").read_text())
    assert len(result.trials) == 2 and all(trial.budget_met for trial in result.trials)
    assert (output / "mlflow.db").exists()


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium: install the Debian package")
def test_results_in_a_real_browser(tmp_path):
    output = tmp_path / "out"
    finish(
        *("run", "jobs/quickstart.yaml", "--output", str(output)),
        *("--set", "cluster.executor=local", "--set", "model.pretrain.epochs=2"),
    )
    result = JobResult.from_json((output / "results/summary.json").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = raycompress("ui", str(output), "--port", str(port), start_new_session=True)
    address = f"http://127.0.0.1:{port}"

    def up():
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=2).read() == b"OK"
        except OSError:
            return False

    def page(fragment, name):
        command = [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-sync"),
            *("--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / name}", "--window-size=1400,1000"),
            "--virtual-time-budget=30000",
        ]
        url = f"{address}/#/{fragment}"
        shot = Path(os.environ.get("RAYCOMPRESS_SCREENSHOTS", tmp_path)) / f"{name}.png"
        for extra in (f"--screenshot={shot}", "--dump-dom"):
            dom = subprocess.run(
                [*command, extra, url], capture_output=True, text=True, timeout=120
            ).stdout
        assert shot.stat().st_size > 10_000
        return dom

    try:
        wait_for(up)
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/2.0/mlflow/runs/get?run_id={result.run_id}")
        ) as answer:
            experiment = json.load(answer)["run"]["info"]["experiment_id"]
        run = f"experiments/{experiment}/runs/{result.run_id}"
        overview = page(run, "overview")
        assert "slim/macs" in overview and "dense/score_test" in overview
        figure = page(f"{run}/artifacts/figures/pareto.png", "figure")
        assert re.search(r"pareto\.png", figure)
        child = f"experiments/{experiment}/runs/{result.trials[0].run_id}"
        assert "best_loss" in page(child, "trial")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
