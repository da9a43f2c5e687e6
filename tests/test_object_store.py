"""A whole job whose output is in an S3-compatible store."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from raycompress import lease
from raycompress.driver import run, validate
from raycompress.errors import ConfigError
from raycompress.ledger import read_ledger
from raycompress.loading import load_job
from raycompress.storage import place_of

JOB = {
    "name": "stored",
    "task": "raycompress.testing:ToyTask",
    "pruners": [{"type": "SimulatedAnnealing", "iterations": 40}],
    "budgets": [{"macs": "50%"}],
    "latency": {"batch_sizes": [1], "repeats": 2},
    "cluster": {"executor": "local", "replicas": 2, "cpus": 0.5},
    "tracking": {"uri": "none"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCOMPRESS_CACHE", str(tmp_path / "cache"))


def keys(output):
    return sorted(record["key"] for record in read_ledger(place_of(output) / "ledger"))


def rows(result):
    """Trials without what time decides."""
    return [
        (
            trial.name,
            trial.counts,
            trial.weights,
            [(r.name, r.params, r.score_test) for r in trial.rows],
        )
        for trial in result.trials
    ]


def command(*arguments):
    return [sys.executable, "-m", "raycompress", *arguments]


def test_a_job_in_this_process_is_the_same_there(s3, tmp_path):
    job = {**JOB, "pruners": [{"type": "SimulatedAnnealing", "iterations": 6}], "sensitivity": {}}
    local = run({**job, "output": str(tmp_path / "out")})
    stored = run({**job, "output": s3})
    assert rows(stored) == rows(local) and stored.output == s3
    assert keys(s3) == keys(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "results").rglob("*") if path.is_file()}
    assert {each.name for each in (place_of(s3) / "results").objects()} == names
    again = run({**job, "output": s3})
    assert again.run_dfe == 0 and rows(again) == rows(local)
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        run({**job, "seed": 1, "output": s3})
    done = subprocess.run(command("report", s3), capture_output=True, text=True)
    assert done.returncode == 0 and "SimulatedAnnealing-macs50" in done.stdout, done.stderr


def test_a_bucket_that_isnt_there(s3):
    with pytest.raises(ConfigError) as caught:
        validate({**JOB, "output": s3.replace("s3://bucket/", "s3://other/")})
    assert str(caught.value).endswith("there is no bucket 'other'")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_it_is_killed_goes_on_and_is_used(s3, tmp_path, monkeypatch):
    job = {**JOB, "pruners": [{"type": "NetAdapt", "iterations": 6}, *JOB["pruners"]]}
    undisturbed = run({**job, "output": str(tmp_path / "out")})
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**job, "output": s3}))
    load_job(file)
    start = command("run", str(file), "--quiet", "--json", "--set", "cluster.executor=ray")
    ledger = place_of(s3) / "ledger"
    driver = subprocess.Popen(start, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        while len(read_ledger(ledger)) < 4:
            assert driver.poll() is None and time.monotonic() < end
            time.sleep(0.1)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = keys(s3)
    assert 4 <= len(before) < len(keys(tmp_path / "out")), "the kill didn't land in mid-work"
    begun = time.monotonic()
    done = subprocess.run(start, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun > lease.EXPIRY  # the dead driver's lease was waited for
    result = json.loads(done.stdout)
    assert [t["weights"] for t in result["trials"]] == [t.weights for t in undisturbed.trials]
    assert [p["id"] for p in result["front"]] == [p.id for p in undisturbed.front]
    after = keys(s3)
    assert after == sorted(set(after)), "a unit was done twice"
    assert after == keys(tmp_path / "out") and set(before) <= set(after)
    point = undisturbed.front[-1].id
    made = subprocess.run(
        command("materialize", s3, "--point", point, "--quiet", "--json"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    folder = place_of(s3) / "materialized" / point
    assert (folder / "model.safetensors").exists() and (folder / "masks.safetensors").exists()
    shown = subprocess.run(command("report", s3, "--markdown"), capture_output=True, text=True)
    assert shown.returncode == 0 and point in shown.stdout, shown.stderr
