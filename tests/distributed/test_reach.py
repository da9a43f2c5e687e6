"""An output that not all nodes see is refused before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from raycompress.distributed.reach import check_reach
from raycompress.errors import ClusterError
from raycompress.storage import ObjectPath

NAMESPACE = ["unshare", "--mount", "--map-root-user"]


@pytest.fixture
def hidden(tmp_path: Path) -> Iterator[Path]:
    """A folder of the first of two nodes; the second, in a mount namespace, has another there."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    mount = f"mount -t tmpfs none {folder}"
    if subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address}"
    node = subprocess.Popen(
        [*NAMESPACE, "sh", "-c", f"{mount} && exec {start} --num-cpus=1 --block"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        end = time.monotonic() + 120
        while sum(each["Alive"] for each in ray.nodes()) < 2:
            assert node.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        yield folder
    finally:
        node.terminate()
        node.wait()
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_folder_that_one_node_doesnt_see(
    hidden: Path, tmp_path: Path, remote: ObjectPath
) -> None:
    address = ray.nodes()[0]["NodeManagerAddress"]
    with pytest.raises(ClusterError) as caught:
        check_reach(hidden)
    assert str(caught.value) == (
        f"output {hidden} isn't seen by node {address} (the driver's files aren't there): what the "
        "driver's disk alone holds can't be shared; give a folder on a file system that all nodes "
        "mount at this path, or an object store (s3://bucket/folder)"
    )
    assert list(hidden.iterdir()) == []
    check_reach(tmp_path / "seen")
    assert list((tmp_path / "seen").iterdir()) == []
    check_reach(remote)
    assert remote.objects() == []
