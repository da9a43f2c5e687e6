"""An S3-compatible store on loopback and a small disk, for tests that ask for one."""

from __future__ import annotations

import logging
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from raycompress.storage import ObjectPath, Place, place_of

BUCKET = "bucket"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """host:port of the store, with one bucket; credentials are in the environment."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        query = f"scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
        FileSystem.from_uri(f"s3://{BUCKET}/?{query}")[0].create_dir(BUCKET)
        yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str) -> str:
    """URI of an empty folder in the store."""
    query = f"scheme=http&endpoint_override={s3_server}"
    return f"s3://{BUCKET}/{uuid.uuid4().hex}?{query}"


@pytest.fixture
def remote(s3: str) -> ObjectPath:
    """The same as a place."""
    place = place_of(s3)
    assert isinstance(place, ObjectPath)
    return place


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder that isn't there yet, on the local disk and in the store."""
    if request.param == "local":
        return tmp_path / "out"
    found: ObjectPath = request.getfixturevalue("remote")
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """512 KiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no permission to mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C reaches this process and those that it starts, also where a shell runs it behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store to copy, without any run: its migrations take seconds."""
    import mlflow

    folder = tmp_path_factory.mktemp("migrated")
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"
