"""The ledger and the weight store, on the local disk and in an S3-compatible store."""

import os
import time

import pytest
import torch

from raycompress import ledger as ledger_module
from raycompress import weights as weights_module
from raycompress.errors import RaycompressError
from raycompress.ledger import Ledger, answers, read_ledger
from raycompress.storage import ObjectPath
from raycompress.weights import Weights, WeightStore


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def some(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    return Weights(
        {"a": torch.randn(2, size, generator=generator), "b": torch.tensor([True, False])},
        {"conv1": (0, 3)},
        {"score": torch.ones(2, dtype=torch.bfloat16)},
    )


def same(one, two):
    assert one.state.keys() == two.state.keys() and one.extra.keys() == two.extra.keys()
    assert all(torch.equal(one.state[n], two.state[n]) for n in one.state)
    assert all(torch.equal(one.extra[n], two.extra[n]) for n in one.extra)
    assert one.kept == two.kept


def test_a_ledger_answers_what_was_put(place):
    with Ledger(place, "a") as ledger:
        assert ledger.get("x") is None
        ledger.put({"x": {"value": 1}, "y": {"value": 2}})
        assert ledger.get("x") == {"key": "x", "value": 1} and len(ledger) == 2
    with Ledger(str(place), "b") as ledger:
        assert ledger.get("y") == {"key": "y", "value": 2}
        ledger.put({"z": {"value": 3}})
    with Ledger(place, "a") as ledger:
        ledger.put({"w": {"value": 4}})
    # By part, then by time of writing.
    assert [record["key"] for record in read_ledger(place)] == ["x", "y", "w", "z"]


@pytest.mark.parametrize("parts", ["ab", "ba"])  # by name, not by time
def test_a_failure_that_was_tried_again_gives_way_to_what_came_of_it(place, parts):
    lost = {"failure": "no memory", "again": True}
    with Ledger(place, parts[0]) as ledger:
        ledger.put({"x": lost, "y": lost})
    with Ledger(place, parts[1]) as ledger:
        assert ledger.get("x") == {"key": "x", **lost}
        ledger.put({"x": {"failure": None}})
        assert ledger.get("x") == {"key": "x", "failure": None}
    with Ledger(place, "c") as ledger:
        assert ledger.get("x") == {"key": "x", "failure": None}
        assert ledger.get("y") == {"key": "y", **lost}
    assert [(r["key"], r["failure"]) for r in answers(place)] == [("x", None), ("y", "no memory")]
    assert len(read_ledger(place)) == 3


def test_what_is_appended_is_there_after_a_commit(place):
    with Ledger(place, "a") as ledger:
        ledger.append({"x": {"value": 1}})
        ledger.commit()
        assert [record["key"] for record in read_ledger(place)] == ["x"]
        ledger.append({"y": {"value": 1}})
    assert [record["key"] for record in read_ledger(place)] == ["x", "y"]


def test_appends_commit_by_themselves_when_time_has_passed(place, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    with Ledger(place, "a") as ledger:
        ledger.append({"x": {}})
        now[0] += ledger_module.COMMIT_SECONDS + 0.1
        ledger.append({"y": {}})
        assert [record["key"] for record in read_ledger(place)] == ["x", "y"]


def test_a_group_of_units_is_one_object(remote):
    with Ledger(remote, "a") as ledger:
        for i in range(20):
            ledger.append({f"{i}": {}})
        ledger.commit()
        ledger.commit()
    assert len(remote.objects()) == 1 and len(read_ledger(remote)) == 20


def test_a_damaged_object_is_named(remote):
    (remote / "a.jsonl").write_bytes(b'{"key": "x"}\nnonsense\n')
    with pytest.raises(RaycompressError, match=r"a\.jsonl.* is damaged at byte 13"):
        read_ledger(remote)


def test_weights_come_back(place):
    store = WeightStore(place / "weights")
    digest = store.put(some())
    assert digest in store and "0" * 16 not in store
    same(store.get(digest), some())
    assert store.kept_counts(digest) == {"conv1": 2}
    same(WeightStore(str(place / "weights")).get(digest), some())
    assert store.put(some()) == digest
    with pytest.raises(RaycompressError, match=f"weights {'0' * 16} are not in "):
        store.get("0" * 16)


def test_tied_weights_are_stored(place):
    tensor = torch.arange(4.0)
    digest = WeightStore(place).put(Weights({"a": tensor, "b": tensor}, {}))
    assert torch.equal(WeightStore(place).get(digest).state["b"], tensor)


def test_weights_are_fetched_once_for_a_node(remote, monkeypatch, cache):
    digest = WeightStore(remote).put(some())
    fetched = []
    read = ObjectPath.read_bytes
    monkeypatch.setattr(
        ObjectPath, "read_bytes", lambda self: (fetched.append(self.name), read(self))[1]
    )
    for _ in range(3):
        same(WeightStore(remote).get(digest), some())  # as another process of the node would
    assert fetched == [f"{digest}.safetensors"]
    assert [file.name for file in cache.iterdir()] == fetched


def test_damaged_weights_are_refused_and_not_kept(remote, cache):
    store = WeightStore(remote)
    one, two = store.put(some(0)), store.put(some(1))
    store.path(one).write_bytes(store.path(two).read_bytes())
    with pytest.raises(RaycompressError, match=f"are damaged: their digest is {two}"):
        store.get(one)
    store.path(one).write_bytes(b"nonsense")
    with pytest.raises(RaycompressError, match="are damaged: their digest is unknown"):
        store.get(one)
    assert list(cache.iterdir()) == []


def test_a_nodes_disk_keeps_what_was_used_last(remote, monkeypatch, cache):
    store = WeightStore(remote)
    digests = [store.put(some(seed, 1000)) for seed in range(3)]
    size = len(store.path(digests[0]).read_bytes())
    monkeypatch.setattr(weights_module, "CACHE_BYTES", 2 * size)
    for age, digest in enumerate(digests[:2]):
        store.get(digest)
        os.utime(cache / f"{digest}.safetensors", (time.time() - 100 + age,) * 2)
    store.get(digests[0])  # used again
    store.get(digests[2])
    assert {file.stem for file in cache.iterdir()} == {digests[0], digests[2]}
    same(store.get(digests[1]), some(1, 1000))
