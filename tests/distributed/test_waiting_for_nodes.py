"""Clusters that may grow are waited for; what Ray answers is played here."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from raycompress.distributed.cluster import check_feasible
from raycompress.errors import ClusterError


def node(cpus: float, **labels: str) -> dict[str, Any]:
    named = {f"ray.io/{name.replace('_', '-')}": value for name, value in labels.items()}
    return {"Alive": True, "Resources": {"CPU": cpus}, "Labels": named}


@pytest.mark.parametrize("grows", [True, False])
def test_a_node_that_comes_in_time(monkeypatch: pytest.MonkeyPatch, grows: bool) -> None:
    answers = [[node(0, node_group="head")]] * 3 + [[node(0, node_group="head"), node(4)]] * grows
    asked: list[Any] = []
    removed: list[Any] = []

    def group(bundles: list[dict[str, float]]) -> str:
        asked.append(bundles)
        return "group"

    monkeypatch.setattr(ray, "nodes", lambda: answers.pop(0) if len(answers) > 1 else answers[0])
    monkeypatch.setattr(ray.util, "placement_group", group)
    monkeypatch.setattr(ray.util, "remove_placement_group", removed.append)
    if grows:
        check_feasible([{"CPU": 2}], "one", 30.0)
    else:
        with pytest.raises(ClusterError, match=r"one: no node has 2 CPU .*no node was added in"):
            check_feasible([{"CPU": 2}], "one", 0.6)
    assert asked == [[{"CPU": 2}]] and removed == ["group"]


def test_a_cluster_that_nobody_grows_refuses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node(1)])
    with pytest.raises(ClusterError, match=r"one: no node has 2 CPU \(1 node"):
        check_feasible([{"CPU": 2}], "one", 600.0)


def test_enough_in_all_may_still_be_too_little_on_each_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node(5), node(4)])
    check_feasible([{"CPU": 2}] * 4, "four", 600.0)
    with pytest.raises(ClusterError, match=r"three: the nodes have room for 2 of 3 CPU \(2 nod"):
        check_feasible([{"CPU": 3}] * 3, "three", 600.0)
