"""Whether every node of a cluster sees the output of a job.

Every node loads this file to answer: it imports little, and no torch.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycompress.errors import ClusterError, ConfigError
from raycompress.storage import Place, place_of, write_whole

__all__ = ["check_reach"]

LOOK_SECONDS = 60.0
"""How long a node may take to say whether it sees the output."""


def check_reach(output: Place) -> None:
    """Tries from every node whether it sees the job's output; on one machine there's no question.

    Raises:
        ClusterError: A node doesn't, and what it finds would be lost.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 and isinstance(output, Path):
        return
    marker = output / f".seen-{uuid.uuid4().hex}"
    write_whole(marker, b"")
    try:
        asked = {}
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options: Any = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
            look = ray.remote(**options)(_look)
            asked[look.remote(str(marker))] = str(node["NodeManagerAddress"])
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)
        reasons = {asked[ref]: f"it didn't answer within {LOOK_SECONDS:g} s" for ref in late}
        for ref in done:
            try:
                reason = ray.get(ref)
            except ray.exceptions.TaskUnschedulableError:
                continue  # the node has gone since
            except ray.exceptions.RayError as error:
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if reason is not None:
                reasons[asked[ref]] = reason
    finally:
        marker.unlink(missing_ok=True)
    if not reasons:
        return
    first, reason = next(iter(reasons.items()))
    more = f" and {len(reasons) - 1} more of {len(nodes)} nodes" if len(reasons) > 1 else ""
    if isinstance(output, Path):
        raise ClusterError(
            f"output {output} isn't seen by node {first}{more} ({reason}): what the driver's disk "
            "alone holds can't be shared; give a folder on a file system that all nodes mount at "
            "this path, or an object store (s3://bucket/folder)"
        )
    raise ClusterError(
        f"output {output} can't be read by node {first}{more} ({reason}): each node needs the way "
        "to the store and its credentials, in the environment in which Ray was started there"
    )


def _look(marker: str) -> str | None:
    """Why this node doesn't see a file that the driver has written; None: it does."""
    try:
        return None if place_of(marker).exists() else "the driver's files aren't there"
    except (OSError, ConfigError) as error:
        return str(error).strip().splitlines()[0]
