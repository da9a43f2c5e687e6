"""What results depend on: edited code and changed files are never answered from before."""

import dataclasses
import importlib
import sys

import pytest

from raycompress.driver import run
from raycompress.identity import source_digest, sources_of, task_digest
from raycompress.ledger import read_ledger
from raycompress.loading import job_key, parse_job
from raycompress.plain import from_plain, to_plain
from raycompress.pruning import L1Filter, Pruner
from raycompress.testing import ToyTask

OWN = """\
from dataclasses import dataclass
from raycompress import Pruner
from raycompress.criteria import L1, Criterion
from raycompress.collect import Collector
from raycompress.method import TrainingMethod
from raycompress.testing import ToyTask


@dataclass(frozen=True, kw_only=True)
class Most(Criterion):
    needs_data = True

    def collect(self, probe):
        return {"sum": next(probe.batches())[0].sum()[None]}

    def group_scores(self, model, group, statistics):
        return [scores * SIGN for scores in L1().group_scores(model, group, {})]


@dataclass(frozen=True, kw_only=True)
class Method(TrainingMethod):
    rate: float = 1.0

    def around(self, run):
        raise NotImplementedError


class Base(ToyTask):
    pass
"""
JOB = {
    "name": "own",
    "task": "raycompress.testing:ToyTask",
    "budgets": [{"macs": "60%"}],
    "latency": {"batch_sizes": [1], "repeats": 2},
    "cluster": {"executor": "local"},
    "tracking": {"uri": "none"},
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module and imports it anew, as the next process would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        import linecache
        import shutil

        linecache.clearcache()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        return importlib.import_module(name)

    yield write
    for name in ("own_code", "own_child"):
        sys.modules.pop(name, None)


def test_source_digest_changes_with_the_source_of_own_classes_alone(written):
    first = source_digest(written("own_code", f"SIGN = 1\n{OWN}").Most)
    same = source_digest(written("own_code", f"SIGN = 1\n{OWN}").Most)
    edited = source_digest(written("own_code", f"SIGN = -1\n{OWN}").Most)
    assert first == same != edited and len(first) == 16
    assert source_digest(L1Filter) == source_digest(ToyTask) == source_digest(int) == ""


def test_a_base_in_another_own_module_counts(written):
    child = "from own_code import Base\nclass Child(Base):\n    pass\n"
    digests = []
    for sign in (1, -1):
        written("own_code", f"SIGN = {sign}\n{OWN}")
        digests.append(task_digest(written("own_child", child).Child()))
    assert digests[0] != digests[1]


def test_sources_of_names_own_classes_and_nothing_else(written):
    most = written("own_code", OWN).Most
    entry = {"type": "OneShot", "criterion": "own_code:Most", "pattern": "2:4", "deep": [
        {"a": "raycompress.pruning:L1Filter", "b": "never.imported:Thing", "c": "own_code:OWN"}
    ]}  # fmt: skip
    assert sources_of(entry) == {"own_code:Most": source_digest(most)}


def test_keys_of_methods_and_criteria_hold_their_source(written):
    method = written("own_code", f"SIGN = 1\n{OWN}").Method(rate=2.0)
    before = to_plain(method)
    after = to_plain(written("own_code", f"SIGN = 2\n{OWN}").Method(rate=2.0))
    assert before["type"] == after["type"] and before != after
    from raycompress.method import TrainingMethod

    assert from_plain(after, TrainingMethod).rate == 2.0
    assert set(to_plain(L1Filter())) == {
        "type", *(field.name for field in dataclasses.fields(L1Filter))
    }  # fmt: skip
    assert from_plain(to_plain(L1Filter(min_kept=2)), Pruner) == L1Filter(min_kept=2)


def counts(result):
    return {name: kept for name, kept, _ in result.trials[0].counts}


def test_an_edited_criterion_is_asked_anew_in_the_same_output(written, tmp_path):
    job = {**JOB, "output": str(tmp_path / "out"),
           "pruners": [{"type": "OneShot", "criterion": "own_code:Most"}]}  # fmt: skip
    written("own_code", f"SIGN = 1\n{OWN}")
    first = run(job)
    lines = len(read_ledger(tmp_path / "out/ledger"))
    assert run(job).trials[0].weights == first.trials[0].weights
    assert (
        len(read_ledger(tmp_path / "out/ledger")) == lines
    )  # the same code: nothing is done again
    written("own_code", f"SIGN = -1\n{OWN}")
    edited = run(job)
    assert edited.trials[0].weights != first.trials[0].weights
    fresh = run({**job, "output": str(tmp_path / "fresh")})
    assert edited.trials[0].weights == fresh.trials[0].weights
    assert counts(edited) == counts(fresh)


def test_job_key_is_of_a_weights_files_content(tmp_path):
    from safetensors.torch import save_file

    model = ToyTask().build_model()
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(model.state_dict(), one)
    two.write_bytes(one.read_bytes())

    def key(path):
        job = {**JOB, "pruners": [{"type": "L1Filter"}], "model": {"weights": str(path)}}
        return job_key(parse_job(job))

    before = key(one)
    assert key(two) == before
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(state, one)
    assert key(one) != before == key(two)


def test_job_key_is_of_own_sources(written):
    job = {**JOB, "pruners": [{"type": "OneShot", "criterion": "own_code:Most"}]}
    keys = []
    for sign in (1, 1, -1):
        written("own_code", f"SIGN = {sign}\n{OWN}")
        keys.append(job_key(parse_job(job)))
    assert keys[0] == keys[1] != keys[2]
