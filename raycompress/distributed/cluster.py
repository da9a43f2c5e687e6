"""The connection to Ray: a given cluster, one that runs here, or one started for the job."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from raycompress.config import ClusterConfig
from raycompress.errors import ClusterError
from raycompress.signals import ignored, terminable

__all__ = ["bundle", "check_address", "check_feasible", "connect", "describe", "reserve"]

_log = logging.getLogger(__name__)

QUIET_SECONDS = 5.0
"""Within which room that others hold may come free before anyone is told of it."""
REACH_SECONDS = 10.0
"""How long a cluster's address is tried."""


@contextmanager
def connect(cluster: ClusterConfig) -> Iterator[None]:
    """Connects this process to Ray, and ends what it started when the block is left.

    In this order: the connection that this process has, `cluster.address`, `RAY_ADDRESS` (set in a
    submitted job), a cluster that `ray start` started on this machine, a local one of its own.

    Raises:
        ClusterError: The address can't be reached.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = cluster.address or os.environ.get("RAY_ADDRESS") or _running_here()
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address in (None, "local"):
        num_cpus = max(os.cpu_count() or 1, math.ceil(cluster.replicas * cluster.cpus) + 1)
        _log.info(
            "no Ray cluster here: starting a local one with %d logical CPUs (%d cores)",
            num_cpus,
            os.cpu_count() or 1,
        )
        options |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    else:
        check_address(address, "cluster.address" if cluster.address else "RAY_ADDRESS")
        options["address"] = address
    try:
        with warnings.catch_warnings(), terminable():  # which takes back Ray's own handler
            warnings.simplefilter("ignore")
            ray.init(**options)
    except Exception as e:  # all kinds, and a bare one of a node that was too slow to start
        hint = (
            "; set RAY_AUTH_MODE to the same value here and where the cluster was started"
            if "auth" in f"{type(e).__name__} {e}".lower()
            else ""
        )
        raise ClusterError(
            f"can't connect to Ray ({address or 'a local one'}): {type(e).__name__}: "
            f"{str(e).strip().splitlines()[0] if str(e).strip() else ''}{hint}"
        ) from e
    try:
        yield
    finally:
        # Cut short, the end of a local cluster would leave processes behind; it takes seconds. Ray
        # sets SIGTERM to its default meanwhile, below Python; leaving these puts that right.
        with ignored() if options["address"] == "local" else terminable():
            ray.shutdown()


def bundle(cluster: ClusterConfig) -> dict[str, Any]:
    """What one replica asks of a node."""
    wanted = {"CPU": cluster.cpus, "GPU": cluster.gpus, **cluster.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def check_feasible(bundles: Sequence[Mapping[str, float]], what: str, timeout: float) -> None:
    """Compares bundles with what the cluster has in all, free or not.

    A cluster that can grow is asked to, and waited for.

    Args:
        bundles: Resources by name, each to be met by one node.
        what: Who asks, for the message, such as "4 replicas don't fit".
        timeout: Seconds to wait for new nodes; 0: not again.

    Raises:
        ClusterError: They can never fit, and Ray would wait for ever.
    """
    problem = _problem(bundles)
    if problem is None:
        return
    advice = "Lower cluster.replicas, cluster.cpus or cluster.gpus, or use a larger cluster"
    if not _can_grow():
        raise ClusterError(f"{what}: {problem} ({describe()}). {advice}")
    _log.warning("%s yet: %s; waiting up to %g s for new nodes", what, problem, timeout)
    # A placement group is what the autoscaler sees; new nodes stay long enough for what comes next.
    group = ray.util.placement_group([dict(each) for each in bundles])
    end = time.monotonic() + timeout
    try:
        while problem is not None:
            if time.monotonic() > end:
                raise ClusterError(
                    f"{what}: {problem} ({describe()}), and no node was added "
                    f"in time (cluster.start_timeout). {advice}"
                )
            time.sleep(0.5)
            problem = _problem(bundles)
    finally:
        ray.util.remove_placement_group(group)


def reserve(
    bundles: Sequence[Mapping[str, float]],
    who: str,
    timeout: float,
    patience: float | None = None,
) -> Any:
    """Sets bundles aside, all at once, and waits while others hold what they need.

    Args:
        bundles: Resources by name, the same for all.
        who: Who asks, for messages, such as "4 replicas".
        timeout: As of `check_feasible`; whether they can still fit is looked at as often.
        patience: Seconds after which others have held it for too long; None: there is no such time.

    Returns:
        Ray's placement group, for `ray.util.remove_placement_group`.

    Raises:
        ClusterError: They can never fit, or not any more, or not for longer than that.
    """
    check_feasible(bundles, f"{who} don't fit", timeout)
    group = ray.util.placement_group([dict(each) for each in bundles])
    try:
        began = looked = time.monotonic()
        told = False
        while not group.wait(1.0):
            if patience is not None and time.monotonic() - began > patience:
                raise ClusterError(f"{who}: others held what it needs for {patience:g} s")
            waited = time.monotonic() - looked
            if waited > QUIET_SECONDS and not told:
                _log.warning("%s wait: others hold what they need of %s", who, describe())
                told = True
            if waited > timeout:
                check_feasible(bundles, f"{who} don't fit any more", timeout)
                looked = time.monotonic()
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    return group


def _problem(bundles: Sequence[Mapping[str, float]]) -> str | None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for each in bundles:
        if not any(all(n.get(k, 0.0) >= v for k, v in each.items()) for n in nodes):
            return f"no node has {_words(each)}"
    for name in sorted({name for each in bundles for name in each}):
        asked = sum(each.get(name, 0.0) for each in bundles)
        there = sum(node.get(name, 0.0) for node in nodes)
        if asked > there + 1e-6:
            return f"they need {asked:g} {name} in all, the cluster has {there:g}"
    each = bundles[0]
    if each and all(other == each for other in bundles):
        room = sum(
            int(min(node.get(name, 0.0) / amount for name, amount in each.items()) + 1e-6)
            for node in nodes
        )
        if room < len(bundles):
            return f"the nodes have room for {room} of {_words(each)}"
    return None


def _can_grow() -> bool:
    """Whether an autoscaler may add nodes.

    Ray's launcher and KubeRay name the group of each node that they start (RAY_NODE_TYPE_NAME,
    which Ray makes a label of); `ray start` by hand doesn't. Without an autoscaler such a cluster
    is waited for in vain, once, until the deadline.
    """
    return any(node["Labels"].get("ray.io/node-group") for node in ray.nodes() if node["Alive"])


def describe() -> str:
    """The cluster's nodes and resources, in words."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return f"{len(nodes)} node(s): " + "; ".join(_words(node) or "nothing" for node in nodes[:8])


def _words(resources: Mapping[str, float]) -> str:
    hidden = ("memory", "object_store_memory")
    return ", ".join(
        f"{amount:g} {name}"
        for name, amount in sorted(resources.items())
        if name not in hidden
        and not name.startswith(("node:", "accelerator_type:", "bundle"))
        and "_group_" not in name
    )


def _running_here() -> str | None:
    """Address of the cluster that `ray start` started on this machine, if it still answers."""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("RAY_TEMP_DIR") or "/tmp")
    path = folder / "ray" / "ray_current_cluster"
    try:
        address = path.read_text().strip()
    except OSError:
        return None
    return address if address and _answers(address, 2.0) else None


def check_address(address: str, key: str) -> None:
    """Raises a ClusterError if no cluster answers at an address within seconds.

    Args:
        address: "auto" isn't looked at.
        key: Where it was given, for messages.
    """
    if address == "auto":
        return
    if "://" in address:
        raise ClusterError(
            f"{key} must be host:port of a running cluster, got {address}: "
            "submit the job there instead (raycompress submit, or ray job submit)"
        )
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ClusterError(f"{key} must be host:port of a running cluster, got {address!r}")
    if not _answers(address, REACH_SECONDS):
        raise ClusterError(
            f"{key}: no Ray cluster answers at {address}; start it, or leave cluster.address and "
            "RAY_ADDRESS empty to run locally"
        )


def _answers(address: str, seconds: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=seconds):
            return True
    except (OSError, ValueError):
        return False
