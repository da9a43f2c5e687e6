"""A full disk under a job on Ray: it ends as the job's failure, and with room the job continues."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from raycompress.driver import run
from raycompress.errors import StorageError
from raycompress.ledger import read_ledger
from tests.disks import KB, Filling
from tests.distributed.chaos import records
from tests.distributed.chaos_jobs import job, told

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.mark.parametrize(
    ("name", "leave"),
    [("net-adapt", 4 * KB), ("study", 0)],
    ids=["weights of a replica", "ledger of a sample"],
)
def test_a_full_disk_fails_the_job_and_no_trial(
    name: str, leave: int, disk: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", disk / "out"
    expected = run(job(name, whole, executor="local"))
    content = job(name, output, 0.01)
    content["task_args"]["log"] = str(tmp_path / "log")
    progress = Filling(disk, leave)
    with pytest.raises(StorageError, match=rf"^no space left to write .*{disk}/out"):
        run(content, progress=progress)
    assert not any("failed" in each for each in progress.messages), progress.messages
    assert read_ledger(output / "ledger")
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    content["cluster"]["executor"] = "local"  # sooner done, and the same job
    assert told(run(content)) == told(expected)
    assert records(output) == records(whole)
