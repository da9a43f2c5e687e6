"""Job files: what is read, what is refused, and where messages point."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from raycompress.config import JobConfig, RecoverConfig, TrainingConfig
from raycompress.errors import ConfigError
from raycompress.importing import resolve
from raycompress.loading import (
    build_pruner,
    build_quantizer,
    dump_job,
    job_key,
    json_schema,
    load_job,
    parse_job,
    pruner_types,
)
from raycompress.pruning import L1Filter, Pruner, SimulatedAnnealing
from raycompress.quantization import QAT, QUANTIZERS, QuantTarget
from raycompress.quantize_section import QuantizeSection
from raycompress.source import Source
from raycompress.task import Task

ROOT = Path(__file__).parent.parent
JOB = """\
name: x
task: raycompress.testing:ToyTask
model: {pretrain: {epochs: 2, lr: 1e-3}}
targets:
  - op_types: [Conv2d]
pruners:
  - type: L1Filter
    round_to: 2
budgets:
  - {macs: 50%, params: 1_000}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # `resolve` adds the current directory

    def to(text, name="job.yaml"):
        (tmp_path / name).write_text(text)
        return name

    return to


def errors_of(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    return str(caught.value).splitlines()


def test_types_become_what_the_dataclasses_say(write):
    job = load_job(write(JOB))
    assert job.model.pretrain == TrainingConfig(epochs=2.0, lr=0.001)
    assert isinstance(job.model.pretrain.epochs, float)
    assert job.targets[0].op_types == ("Conv2d",)
    assert job.budgets == ({"macs": "50%", "params": 1000},)
    assert parse_job(dataclasses.asdict(job)) == job


def test_dumped_job_reads_back_equal(write):
    job = load_job(write(JOB))
    assert load_job(write(dump_job(job), "dumped.yaml")) == job


def test_all_mistakes_are_listed_in_the_files_order(write):
    text = (
        JOB.replace("lr: 1e-3", "lr: '1'")
        .replace("[Conv2d]", "Conv2d")
        .replace("round_to: 2", "round_to: 0")
        .replace("50%", "0%")
    )
    assert errors_of(write(text + "sed: 1\nseed: true\n")) == [
        "job.yaml, line 3: model.pretrain.lr must be a number, got '1'",
        "job.yaml, line 5: targets[0].op_types must be a list, got 'Conv2d'; write [Conv2d]",
        "job.yaml, line 8: pruners[0].round_to must be at least 1, got 0",
        "job.yaml, line 10: budgets[0].macs must be a percentage kept such as 50%, above 0% and "
        "at most 100%, or a number above 0, got '0%'",
        "job.yaml, line 11: sed is no key of a job; did you mean 'seed' or 'seeds'?",
        "job.yaml, line 12: seed must be an integer, got true",
    ]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("seeds: [1, 1]", "line 11: seeds must differ, got [1, 1]"),
        ("recover: {lr: 1}", "line 11: recover.epochs is missing: Passes over the train split"),
        (
            "recover: {epochs: 1, distill: {weight: 2}}",
            "line 11: recover.distill.weight must be in",
        ),
        (
            "recover: {epochs: 1, distill: {temprature: 2}}",
            "line 11: recover.distill.temprature is no",
        ),
        ("recover: 3", "line 11: recover must be a mapping of keys to values, got 3"),
        ("recover: {epochs: .inf}", "line 11: recover.epochs must be plain data with finite"),
        ("cluster: {replica: 3}", "line 11: cluster.replica is no key of cluster; did you mean"),
        ("cluster: {executor: local, gpus: 1}", "line 11: cluster.gpus must be 0 with executor "),
        (
            "cluster: {resources: {GPU: 1}}",
            "line 11: cluster.resources: GPU is given as cluster.gp",
        ),
        (
            "cluster: {resources: {a100: 0}}",
            "line 11: cluster.resources: a100 must be above 0, and",
        ),
        (
            "cluster: {executor: local, resources: {a: 1}}",
            "line 11: cluster.resources must be empty with executor 'local'",
        ),
        (
            "latency: {resources: {phone: 1.5}}",
            "line 11: latency.resources: phone must be above 0, and whole above 1, got 1.5",
        ),
        (
            "latency: {resources: {memory: 1}}",
            "line 11: latency.resources must name resources of Ray's nodes, got 'memory'",
        ),
        (
            "cluster: {executor: local}\nlatency: {resources: {phone: 1}}",
            "line 12: latency: resources must be empty with executor 'local'",
        ),
        ("cluster: {executor: rey}", "line 11: cluster.executor must be one of 'ray', 'local', "),
        ("cluster: {max_concurrent: 0}", "line 11: cluster.max_concurrent must be above 0, got 0"),
        ("evaluation:\n  threads: 0", "line 12: evaluation.threads must be at least 1, got 0"),
        ("sensitivity: {criterion: l3}", "line 11: sensitivity.criterion: no criterion 'l3'"),
        ("sensitivity: {sparsities: []}", "line 11: sensitivity.sparsities must be ascending"),
        ("latency: {batch_sizes: [1.5]}", "line 11: latency.batch_sizes[0] must be an integer"),
        ("task_args: [1]", "line 11: task_args must be a mapping of keys to values, got [1]"),
        ("3: x", "line 11: keys must be text, got 3"),
        ("output: !!binary aGk=", "line 11: output must be plain data, got tag:yaml.org,2002"),
        ("output: !!python/object:os.x {}", "line 11: output must be plain data, got tag:yaml"),
        ("output: &a [*a]", "line 11: output[0] contains itself through an alias"),
        ("output:\n\t- x", "line 12, column 1: not valid YAML: found character '\\t' that cannot"),
        ("output: a: b", "line 11, column 10: not valid YAML: mapping values are not allowed"),
        ("output: *no", "line 11, column 9: not valid YAML: found undefined alias 'no'"),
    ],
)
def test_one_mistake_and_its_line(write, end, expected):
    (message,) = errors_of(write(f"{JOB}{end}\n"))
    assert message.startswith(f"job.yaml, {expected}")


def test_yaml_is_version_1_2_with_underscores():
    source = Source.parse(
        "a: no\nb: 1e3\nc: 1_000\nd: 2026-01-02\ne: 1:30\nf: 010\ng: ~\nh: .5\ni: true\nj:\n", "x"
    )
    assert source.data == {
        "a": "no",
        "b": 1000.0,
        "c": 1000,
        "d": "2026-01-02",
        "e": "1:30",
        "f": "010",
        "g": None,
        "h": 0.5,
        "i": True,
        "j": None,
    }


def test_anchors_merge_and_are_no_duplicates():
    source = Source.parse("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n", "x")
    assert source.data["b"] == {"x": 1, "y": 3}


def test_aliases_cant_multiply_without_end():
    bomb = "a0: &a0 [1, 1]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    with pytest.raises(ConfigError, match="more than 100000 values"):
        Source.parse(bomb, "x")


def test_files_that_are_none(write, tmp_path):
    write(JOB, "quick.yaml")
    assert errors_of("quik.yaml") == ["quik.yaml: no such file; did you mean quick.yaml?"]
    assert errors_of(str(tmp_path)) == [f"{tmp_path} is a folder, not a job file"]
    assert errors_of(write("")) == ["job.yaml is empty; a job needs at least a name and a task"]
    assert errors_of(write("- 1")) == ["job.yaml must be a mapping of keys to values, got [1]"]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert errors_of("binary.yaml") == ["binary.yaml isn't a text file in UTF-8"]


def test_overrides_apply_in_order_and_make_what_is_missing(write):
    job = load_job(
        write(JOB),
        ["budgets.0.macs=30%", "pruners[0].round_to=4", "recover.epochs=1", "recover.lr=1e-2"],
    )
    assert job.budgets[0] == {"macs": "30%", "params": 1000}
    assert job.pruners[0]["round_to"] == 4
    assert job.recover == RecoverConfig(epochs=1.0, lr=0.01)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "must be KEY=VALUE, such as cluster.replicas=4 or budgets.0.macs=30%"),
        ("=3", "must be KEY=VALUE, such as cluster.replicas=4 or budgets.0.macs=30%"),
        ("seed=x", "seed must be an integer, got 'x'"),
        ("name.x=3", "name is 'x', which has no key 'x'"),
        ("pruners.1.x=3", "pruners is a list and has no entry 1 (it has only 0)"),
        ("seeds.0=3", "the job has no seeds; give the whole list"),
        ("pruners.0.sparsity=1", "pruners[0].sparsity must be in [0, 1), got 1"),
        ("recover.lr=1", "recover.epochs is missing: Passes over the train split, above 0; a "
         "fraction ends within a pass"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named(write, override, expected):
    assert errors_of(write(JOB), [override]) == [f"--set {override}: {expected}"]


def test_pruners_are_built_from_names_and_import_paths():
    assert build_pruner({"type": "L1Filter", "sparsity": 0}) == L1Filter(sparsity=0.0)
    path = "raycompress.pruning.simulated_annealing:SimulatedAnnealing"
    assert build_pruner({"type": path, "iterations": 3}) == SimulatedAnnealing(iterations=3)
    assert {"L1Filter", "Level", "SimulatedAnnealing"} <= set(pruner_types())


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"type": "L1Filtr"}, "p.type: no pruner 'L1Filtr'; did you mean 'L1Filter' or"),
        ({"sparsity": 0.5}, "p.type must be one of ADMM, AGP, "),
        ({"type": "L1Filter", "sparsty": 0}, "p.sparsty is no key of L1Filter; did you mean"),
        ({"type": "L1Filter", "sparsity": "0.5"}, "p.sparsity must be a number, got '0.5'"),
        ({"type": "os:getcwd"}, "p.type: 'os:getcwd' is an object of type"),
    ],
)
def test_bad_pruners(entry, expected):
    with pytest.raises(ConfigError) as caught:
        build_pruner(entry, "p")
    assert str(caught.value).startswith(expected)


def test_resolve_says_what_is_wrong_with_a_users_module(write):
    write("import no_such_library_at_all\n", "user_broken.py")
    write("def f(:\n", "user_syntax.py")
    write("import sys\nsys.exit('bye')\n", "user_exits.py")
    write("from raycompress import Pruner\nclass Mine(Pruner):\n    pass\n", "mine_pruner.py")
    expected = {
        "user_broken:T": "task: importing 'user_broken' failed at user_broken.py, line 1: "
        "ModuleNotFoundError: No module named 'no_such_library_at_all'",
        "user_syntax:T": "task: importing 'user_syntax' failed at user_syntax.py, line 1: "
        "SyntaxError: invalid syntax",
        "user_exits:T": "task: importing 'user_exits' failed at user_exits.py, line 2: "
        "SystemExit: bye",
        "mine_pruner:Mine": "task: 'mine_pruner:Mine' is a class Mine, and must be a subclass of "
        "raycompress.Task",
        "mine_prnr:Mine": f"task: no module 'mine_prnr' in {Path.cwd()} or among the installed "
        "packages; did you mean 'mine_pruner'?",
        "user.pruner.Mine": "task must be 'package.module:Class', got 'user.pruner.Mine'; did you "
        "mean 'user.pruner:Mine'?",
    }
    for path, message in expected.items():
        with pytest.raises(ConfigError) as caught:
            resolve(path, Task)
        assert str(caught.value) == message
    with pytest.raises(ConfigError, match="no 'Min'; did you mean 'Mine'"):
        resolve("mine_pruner:Min", Pruner)


QUANTIZE = """\
quantize:
  type: QAT
  per_channel: false
  config_list:
    - {op_types: [Conv2d], quant_bits: {weight: 8, input: 8}, quant_start_step: 5}
  training: {epochs: 3, lr: 1e-3}
  lower: none
"""


def test_quantize_holds_the_keys_of_the_section_and_of_the_quantizer(write):
    job = load_job(write(JOB + QUANTIZE))
    assert build_quantizer(job.quantize) == (
        QAT(per_channel=False),
        QuantizeSection(
            config_list=(
                QuantTarget(
                    op_types=("Conv2d",),
                    quant_bits={"weight": 8, "input": 8},
                    quant_start_step=5,
                ),
            ),
            training=TrainingConfig(epochs=3.0, lr=0.001),
            lower="none",
        ),
    )
    assert load_job(write(dump_job(job), "dumped.yaml")) == job


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "type: QAT",
            "type: QAD",
            "line 12: quantize.type: no quantizer 'QAD'; did you",
        ),
        ("type: QAT", "type: os:getcwd", "line 12: quantize.type: 'os:getcwd' is an object of"),
        ("type: QAT", "batches: 8", "line 11: quantize.type must be one of Naive, "),
        (
            "per_channel",
            "per_chanel",
            "line 13: quantize.per_chanel is no key of QAT; did",
        ),
        ("epochs: 3", "epochs: 0", "line 16: quantize.training.epochs must be above 0, got 0"),
        ("lower: none", "batches: 0", "line 17: quantize.batches must be at least 1, got 0"),
        ("weight: 8", "weigth: 8", "line 15: quantize.config_list[0].quant_bits: no part 'weigth'"),
        ("step: 5", "step: -5", "line 15: quantize.config_list[0].quant_start_step must be an"),
        ("quant_bits: {", "quant_bit: {", "line 15: quantize.config_list[0].quant_bit is no key"),
    ],
)
def test_a_wrong_quantize_is_named(write, old, new, expected):
    text = JOB + QUANTIZE
    assert old in text
    (error,) = errors_of(write(text.replace(old, new)))
    assert error.startswith(f"job.yaml, {expected}"), error


def test_job_key_of_quantization(write):
    plain = job_key(load_job(write(JOB)))
    path = write(JOB + QUANTIZE)
    key = job_key(load_job(path))
    assert job_key(load_job(path, ["quantize.batches=8"])) == key != plain
    assert job_key(load_job(path, ["quantize.batches=4"])) not in (key, plain)
    assert job_key(load_job(path, ["quantize.per_channel=true"])) not in (key, plain)


def test_job_key_is_of_what_determines_results(write):
    path = write(JOB)
    key = job_key(load_job(path))
    same = ["name=y", "output=/tmp/o", "cluster.replicas=7", "tracking.uri=none",
            "pruners.0.min_kept=1", "seeds=[0]"]  # fmt: skip
    other = ["seed=1", "pruners.0.min_kept=2", "budgets.0.macs=51%", "task_args={width: 4}",
             "evaluation.threads=2", "seeds=[1]"]  # fmt: skip
    assert {job_key(load_job(path, [each])) for each in same} == {key}
    assert len({key, *(job_key(load_job(path, [each])) for each in other)}) == 1 + len(other)


def test_schema_describes_every_key_and_each_pruner():
    schema = json_schema()
    json.dumps(schema)
    fields = {field.name for field in dataclasses.fields(JobConfig)}
    assert set(schema["properties"]) == fields
    assert all(schema["properties"][name]["description"] for name in fields)
    assert schema["additionalProperties"] is False
    for name, cls in pruner_types().items():
        definition = schema["$defs"][name]
        assert definition["properties"]["type"] == {"const": name}
        for field in dataclasses.fields(cls):
            assert definition["properties"][field.name]["description"]


def test_schema_describes_the_keys_of_each_quantizer():
    schema = json_schema()
    entries = schema["properties"]["quantize"]["anyOf"]
    assert len(entries) == len(QUANTIZERS) + 2  # one's own, and none
    for name, cls in QUANTIZERS.items():
        assert {"$ref": f"#/$defs/{name}"} in entries
        definition = schema["$defs"][name]
        assert definition["additionalProperties"] is False
        for field in (*dataclasses.fields(cls), *dataclasses.fields(QuantizeSection)):
            assert definition["properties"][field.name]["description"]
    assert "quant_bits" in schema["$defs"]["QuantTarget"]["properties"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/*.yaml")), ids=lambda path: path.name)
def test_shipped_jobs_load(path):
    assert load_job(path).name


def test_loading_a_job_needs_neither_ray_nor_mlflow(write):
    code = (
        "import sys; from raycompress.loading import load_job; load_job('job.yaml'); "
        "assert not {'ray', 'mlflow'} & set(sys.modules)"
    )
    write(JOB)
    subprocess.run([sys.executable, "-c", code], check=True)
