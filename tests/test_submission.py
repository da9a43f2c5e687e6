"""What a submitted job takes with it, and what is refused before it travels."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from raycompress import submission
from raycompress.cli import app
from raycompress.errors import ConfigError
from raycompress.submission import find_files, pack, prepare_submission

JOB = """\
name: sent
task: raycompress.testing:ToyTask
pruners: [{type: L1Filter, sparsity: 0.5}]
"""


def write(folder, *names, size=3):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def test_code_is_sent_and_nothing_else(tmp_path):
    code = ["a.py", "jobs/x.yaml", "my/data/__init__.py", "my/data/loader.py", "my/words.txt"]
    write(
        tmp_path,
        *code,
        *(".git/config", "__pycache__/a.pyc", ".venv/pyvenv.cfg", ".venv/lib/b.py"),
        *("any/pyvenv.cfg", "any/c.py", "conda/conda-meta/x.json", "conda/d.py"),
        *("mlruns/0/meta.yaml", "mlflow.db", "mlflow.db-wal", "data/images.bin", "runs/e.txt"),
        *("w.pt", "w.safetensors", "my/w.npz", ".env", ".ruff_cache/f", "my/dist/g.py"),
        *("my/private/h.py", "big/i.py"),
    )
    (tmp_path / "my/.gitignore").write_text("dist/\n/private\n")
    (tmp_path / ".rayignore").write_text("big\n")
    sent = set(find_files(tmp_path).sizes)
    assert sent == {*code, "my/.gitignore", ".rayignore"}


def test_a_gitignore_can_take_back_what_it_ignores(tmp_path):
    write(tmp_path, "a.log", "b.log")
    (tmp_path / ".gitignore").write_text("*.log\n!b.log\n")
    assert "b.log" in find_files(tmp_path).sizes and "a.log" not in find_files(tmp_path).sizes


def test_links_to_folders_are_not_followed(tmp_path):
    write(tmp_path / "elsewhere", "data.py")
    write(tmp_path / "here", "a.py")
    (tmp_path / "here/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here/loop").symlink_to(tmp_path / "here")
    assert set(find_files(tmp_path / "here").sizes) == {"a.py"}


def test_too_much_is_refused_with_the_largest_files(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "MAX_BYTES", 3 * 1024**2)
    write(tmp_path, "a.py")
    for index in range(1, 8):
        write(tmp_path, f"raw/{index}.bin", size=index * 1024**2 // 2)
    with pytest.raises(ConfigError) as caught:
        find_files(tmp_path)
    assert str(caught.value) == (
        f"working directory {tmp_path} has 8 files with 14.0 MiB in all to send, and Ray takes "
        "3.0 MiB; the largest: raw/7.bin (3.5 MiB), raw/6.bin (3.0 MiB), raw/5.bin (2.5 MiB), "
        "raw/4.bin (2.0 MiB), raw/3.bin (1.5 MiB). Name what isn't code in .rayignore, and put "
        "data where the cluster's machines can read it"
    )


def test_equal_files_make_equal_packages(tmp_path):
    digests = []
    for name in ("one", "two"):
        folder = tmp_path / name
        write(folder, "b/c.py", "a.py")
        (folder / "a.py").chmod(0o755)
        pack(find_files(folder), tmp_path / f"{name}.zip")
        digests.append((tmp_path / f"{name}.zip").read_bytes())
    assert digests[0] == digests[1]
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == ["a.py", "b/c.py"] and archive.read("a.py") == b"xxx"
        assert archive.getinfo("a.py").external_attr >> 16 & 0o777 == 0o755


def test_weights_that_a_job_names_are_sent_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "w.safetensors", "other.safetensors")
    (tmp_path / "job.yaml").write_text(JOB + "model: {weights: w.safetensors}\n")
    found = prepare_submission(Path("job.yaml"), ["seed=1"], "/shared/out", Path("."))
    assert set(found.files.sizes) == {"job.yaml", "w.safetensors"}
    assert found.entrypoint("python3") == (
        "exec python3 -m raycompress run job.yaml --set seed=1 --output /shared/out"
    )
    (tmp_path / "job.yaml").write_text(JOB + "model: {weights: gone.safetensors}\n")
    with pytest.raises(ConfigError, match=r"no file .*gone.safetensors, which the job names"):
        prepare_submission(Path("job.yaml"), [], None, Path("."))


def test_arguments_are_quoted_for_the_shell(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    override = "task_args={a: '$(touch x); b'}"
    found = prepare_submission(tmp_path / "job.yaml", [override], None, tmp_path)
    import shlex

    assert shlex.split(found.entrypoint("python"))[-1] == override


@pytest.mark.parametrize(
    ("end", "arguments", "message"),
    [
        ("output: here\n", [], "output must be an absolute path or a URI, got 'here': a submitted "
         "job's working directory is thrown away"),
        ("", ["--output", "here"], "output must be an absolute path or a URI, got 'here': a "
         "submitted job's working directory is thrown away"),
        ("cluster: {address: 'h:6379'}\n", [], "cluster.address must be empty in a submitted job, "
         "which uses the cluster that it runs on, got 'h:6379'"),
        ("", ["--set", "tracking.uri='postgresql://me:secret@h/db'"],
         "--set tracking.uri='postgresql://me:***@h/db': a secret in a command can be read on "
         "Ray's dashboard; put it into the job file, or into the cluster's environment "
         "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"),
        ("", ["--set", "task_args.api_token=abc"], "--set task_args.api_token=***: a secret in a "
         "command can be read on Ray's dashboard; put it into the job file, or into the "
         "cluster's environment (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"),
        ("", ["--working-dir", "below"], "job.yaml isn't below the working directory CWD/below, "
         "which is what the cluster gets; give --working-dir"),
        ("sed: 1\n", [], "job.yaml, line 4: sed is no key of a job; did you mean 'seed' or "
         "'seeds'?"),
        ("", ["--resume", "sent"], "give a job file, or --resume with the name of a job"),
        ("", ["--driver-cpus", "-1"], "--driver-cpus must be 0 or more, got -1"),
        ("", ["--runtime-env", "env.yaml"], "env.yaml: working_dir is what submit sends; use "
         "--working-dir"),
        ("", ["--address", "127.0.0.1:6379"], "--address must be that of the cluster's dashboard, "
         "such as http://127.0.0.1:8265, got '127.0.0.1:6379'"),
        ("", ["--address", "http://127.0.0.1:9"], "no job server answers at http://127.0.0.1:9; "
         "is the cluster up, and does its dashboard listen where this machine reaches it (ray "
         "start --dashboard-host, or an SSH tunnel)?"),
    ],
)  # fmt: skip
def test_what_cant_be_submitted(end, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "job.yaml").write_text(JOB + end)
    (tmp_path / "env.yaml").write_text("working_dir: /x\n")
    before = set(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["submit", "job.yaml", *arguments])
    assert done.output == f"error: {message.replace('CWD', str(tmp_path))}\n"
    assert done.exit_code == 2 and set(tmp_path.rglob("*")) == before


def test_a_submission_is_checked_without_ray(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    code = (
        "import sys; from pathlib import Path\n"
        "from raycompress.submission import prepare_submission\n"
        "prepare_submission(Path('job.yaml'), [], None, Path('.'))\n"
        "assert not {'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_stop_and_status_of_nothing():
    for command in (["stop", "x"], ["status", "x"], ["status"]):
        done = CliRunner().invoke(app, [*command, "--address", "http://127.0.0.1:9"])
        assert done.exit_code == 2 and "no job server answers" in done.output


def test_names_that_look_alike_have_submissions_of_their_own():
    from raycompress.distributed.jobs import _plain

    assert _plain("nets-v1.2_a") == "nets-v1.2_a"
    found = {_plain(name) for name in ("a_b", "a b", "a/b", "a?b")}
    assert len(found) == 4 and all(re.fullmatch(r"[\w.-]+", name) for name in found)
