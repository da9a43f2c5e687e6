"""Why replicas are lost, and what is said of a unit that is given up for it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from raycompress.candidate import id_of
from raycompress.errors import ClusterError, RaycompressError
from raycompress.units import Unit

__all__ = ["UNREACHABLE", "advised", "cause_of", "loss_reason", "named", "on_living_nodes"]

UNREACHABLE = "it can't be reached any more: its node was lost, or its process died unnoticed"
"""Why a replica was lost that may be no fault of its unit's."""
NODE_SECONDS = 60.0
"""Within which Ray notices that a node is gone; its replicas can't be reached long before."""


def loss_reason(error: Exception) -> str:
    """The one line of Ray's long story that says why."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = cause_of(error)
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    text = " ".join(str(error).split())
    if isinstance(error, ray.exceptions.ActorUnavailableError) or "node has died" in text:
        return UNREACHABLE
    # Ray names the OOM killer as a possible cause of any death: only its own monitor's word counts.
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "low on memory" in text:
        return "its process was killed for lack of memory"
    detail = re.search(r"Worker exit detail: (.{1,120}?)(\. |$)", text)
    return f"its process died ({detail.group(1)})" if detail else text[:160]


def named(unit: Unit) -> str:
    """What a unit does, with its candidate's id in the table of points."""
    candidate = unit.candidate
    what = "training" if candidate.training else "evaluation"
    key = replace(candidate, shards=None, training=None).key()
    return f"{'collection' if candidate.collect else what} of candidate {id_of(key)}"


def advised(reason: str) -> str:
    """Why something was given up; where memory lacked, with what to do about it."""
    if "memory" not in reason and "_ALLOC_FAILED" not in reason:
        return reason
    return (
        f"{reason}; give each replica more memory: let fewer run on a node or a GPU (lower "
        "cluster.replicas, or raise cluster.cpus or cluster.gpus), or take smaller batches "
        "(evaluation.batch_size; the task's own when it trains)"
    )


def on_living_nodes(nodes: Sequence[str], most: int) -> list[str]:
    """Those that aren't ids of dead nodes; waits until Ray knows, or fewer than `most` are left."""
    deadline = time.monotonic() + NODE_SECONDS
    while True:
        dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
        left = [node for node in nodes if node not in dead]
        if len(left) < most or not any(left) or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def cause_of(error: Any) -> Exception:
    """The exception that was raised in the replica."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, RaycompressError):
        return cause
    return ClusterError(f"a replica failed: {type(cause).__name__}: {cause}")
