"""One driver and one job for each output folder; a job that was changed says how."""

import subprocess
import sys

import pytest
import yaml

from raycompress.driver import run
from raycompress.errors import ConfigError, InputError
from raycompress.loading import parse_job
from raycompress.output import check_changes, keep_job, lock
from raycompress.progress import SilentProgress

JOB = {
    "name": "one",
    "task": "raycompress.testing:ToyTask",
    "pruners": [{"type": "SimulatedAnnealing", "iterations": 10}, {"type": "L1Filter"}],
    "budgets": [{"macs": "50%"}],
    "latency": {"batch_sizes": [1], "repeats": 2},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


def refused(output, job):
    with pytest.raises(ConfigError) as caught:
        check_changes(parse_job(job), output)
    return str(caught.value)


def test_each_changed_key_is_named_with_both_values(tmp_path):
    keep_job(parse_job(JOB), tmp_path)
    job = {
        **JOB,
        "name": "other name",  # no results depend on it
        "seed": 3,
        "pruners": [{"type": "SimulatedAnnealing", "iterations": 20}, {"type": "L1Filter"}],
        "recover": {"epochs": 2},
        "evaluation": {"batch_size": 64},
        "cluster": {"executor": "ray", "replicas": 9},
    }
    assert refused(tmp_path, job) == (
        "seed was 0, now 3\n"
        "pruners[0].iterations was 10, now 20\n"
        'recover was null, now {"epochs": 2.0, "lr": null, "distill": null}\n'
        "evaluation.batch_size was 256, now 64\n"
        f"output {tmp_path} holds the job 'one' with other settings; change them back to continue "
        "it, give another --output, or go on with --changed, which keeps what still holds and "
        "replaces the results"
    )


def test_what_was_asked_for_before_may_not_be_dropped(tmp_path):
    keep_job(parse_job({**JOB, "seeds": [0, 1]}), tmp_path)
    assert refused(tmp_path, {**JOB, "seeds": [1, 2]}).startswith("seeds[0] was 0, now 1\nseeds[1]")
    assert refused(tmp_path, {**JOB, "seeds": [1]}).startswith("seeds was [0, 1], now [1]\n")


def test_the_same_job_and_more_of_it_continue(tmp_path):
    keep_job(parse_job(JOB), tmp_path)
    more = {
        **JOB,
        "pruners": [{"type": "FPGM"}, *JOB["pruners"]],
        "budgets": [*JOB["budgets"], {"macs": "30%"}],
        "seeds": [0, 1],
        "sensitivity": {},
    }
    written_out = [
        {"type": "SimulatedAnnealing", "iterations": 10, "min_kept": 1},
        JOB["pruners"][1],
    ]
    for job in (JOB, more, {**JOB, "pruners": written_out}, {**JOB, "output": "/elsewhere"}):
        check_changes(parse_job(job), tmp_path)
    keep_job(parse_job(more), tmp_path)
    check_changes(parse_job({**more, "sensitivity": None}), tmp_path)


def test_a_job_file_that_cant_be_read_any_more(tmp_path):
    keep_job(parse_job(JOB), tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(path.read_text().replace("L1Filter", "Gone"))
    assert refused(tmp_path, JOB).startswith(f"output {tmp_path} holds a job that can't be read")


def test_a_changed_job_starts_nothing_and_goes_on_when_told_to(tmp_path):
    job = {**JOB, "output": str(tmp_path), "pruners": [{"type": "L1Filter"}]}
    run(job)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != "lock"}
    other = {**job, "evaluation": {"batch_size": 64}}
    with pytest.raises(InputError, match=r"evaluation\.batch_size was 256, now 64"):
        run(other)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != "lock"} == before
    run(other, changed=True)
    assert yaml.safe_load((tmp_path / "job.yaml").read_text())["evaluation"]["batch_size"] == 64


def test_a_continued_job_says_so(tmp_path):
    messages = []

    class Told(SilentProgress):
        def message(self, text):
            messages.append(text)

    job = {**JOB, "output": str(tmp_path), "pruners": [{"type": "L1Filter"}]}
    run(job, progress=Told())
    assert messages == []
    run(job, progress=Told())
    lines = sum(p.read_text().count("\n") for p in (tmp_path / "ledger").glob("*.jsonl"))
    assert messages == [f"Continues: {lines} finished units of work are in {tmp_path}"]


def test_the_second_driver_is_refused_and_told_of_the_first(tmp_path):
    code = (
        "import sys, time, pathlib; from raycompress.output import lock\n"
        "with lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        import socket

        with pytest.raises(ConfigError) as caught, lock(tmp_path):
            pass
        assert str(caught.value) == (
            f"output {tmp_path} is being written by another driver (process {holder.pid} on "
            f"{socket.gethostname()}); wait for it or stop it, or give another --output"
        )
    finally:
        holder.kill()
        holder.wait()
    with lock(tmp_path):  # a killed driver holds nothing
        pass
