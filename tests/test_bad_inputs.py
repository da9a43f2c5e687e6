"""What users get wrong: one screen that names file, key, value and remedy; nothing has started."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from raycompress.cli import app
from raycompress.criteria import CRITERIA
from raycompress.quantization.lowering import BACKENDS

HERE = Path(__file__).parent
BASE = """\
name: bad
task: raycompress.testing:ToyTask
pruners:
  - {type: L1Filter}
budgets:
  - {macs: 50%}
cluster: {executor: ray}
tracking: {uri: none}
"""
TASK = "raycompress.testing:ToyTask"
BUDGETS = "budgets:\n  - {macs: 50%}\n"
RAY = "{executor: ray}"
SERVER = "http://user:secret@127.0.0.1:9"

# name -> (replacements in BASE, text at its end, arguments, the exact error; FILE is the job)
CASES = {
    "unknown pruner": (
        [("L1Filter", "L1Filtr")],
        "",
        [],
        "FILE, line 4: pruners[0].type: no pruner 'L1Filtr'; did you mean 'L1Filter' or "
        "'L2Filter'?",
    ),
    "misspelt key": (
        [("budgets:", "budgetz:")],
        "",
        [],
        "FILE, line 5: budgetz is no key of a job; did you mean 'budgets'?",
    ),
    "sparsity out of range": (
        [("{type: L1Filter}", "{type: L1Filter, sparsity: 1.5}"), (BUDGETS, "")],
        "",
        [],
        "FILE, line 4: pruners[0].sparsity must be in [0, 1), got 1.5",
    ),
    "no task": (
        [(f"task: {TASK}\n", "")],
        "",
        [],
        'FILE: task is missing: Import path of the Task, "package.module:Class"',
    ),
    "no such module": (
        [(TASK, "no_such_module:Task")],
        "",
        [],
        "FILE, line 2: task: no module 'no_such_module' in CWD or among the installed packages",
    ),
    "module that can't be imported": (
        [(TASK, "broken_import:Task")],
        "",
        [],
        "FILE, line 2: task: importing 'broken_import' failed at broken_import.py, line 3: "
        "ModuleNotFoundError: No module named 'no_such_library'",
    ),
    "misspelt class": (
        [("ToyTask", "ToyTsk")],
        "",
        [],
        "FILE, line 2: task: module 'raycompress.testing' has no 'ToyTsk'; did you mean 'ToyTask'?",
    ),
    "not a task": (
        [(TASK, "bad_tasks:NotATask")],
        "",
        [],
        "FILE, line 2: task: 'bad_tasks:NotATask' is a class NotATask, and must be a subclass of "
        "raycompress.Task",
    ),
    "task arguments": (
        [],
        "task_args: {depth: 3}\n",
        [],
        f"FILE, line 2: task {TASK} can't be constructed with task_args {{'depth': 3}}: TypeError: "
        "ToyTask.__init__() got an unexpected keyword argument 'depth'",
    ),
    "budget out of reach": (
        [("50%", "0.1%")],
        "",
        [],
        "FILE: budget macs 0.1% can't be reached: with the fewest channels in all 2 prunable "
        "groups the model keeps macs 2.91%; raise the budget, or allow more layers to be pruned",
    ),
    "unknown resource": (
        [("macs: 50%", "mac: 50%")],
        "",
        [],
        "FILE, line 6: budgets[0].mac is no resource; allowed: latency_ms, macs, params; "
        "did you mean 'macs'?",
    ),
    "budget above the whole": (
        [("50%", "150%")],
        "",
        [],
        "FILE, line 6: budgets[0].macs must be a percentage kept such as 50%, above 0% and at "
        "most 100%, or a number above 0, got '150%'",
    ),
    "output is a file": (
        [],
        "output: bad_tasks.py\n",
        [],
        "FILE, line 9: output CWD/bad_tasks.py can't be made: CWD/bad_tasks.py is a file",
    ),
    "output is a URI of another kind": (
        [],
        "output: ftp://host/x\n",
        [],
        "FILE, line 9: output: ftp://host/x must be a path, file:///folder, s3://bucket/folder or "
        "gs://bucket/folder",
    ),
    "output is an object store, where no database can be": (
        [("tracking: {uri: none}\n", "")],
        "output: s3://bucket/x?endpoint_override=127.0.0.1:1\n",
        [],
        "FILE: tracking.uri must be a server's address, a SQLite file on the driver's machine or "
        "none where output is in an object store, got nothing",
    ),
    "output can't be written": (
        [],
        "output: /proc/raycompress\n",
        [],
        "FILE, line 9: output /proc/raycompress can't be made: No such file or directory",
    ),
    "tracking server not there": (
        [("uri: none", f"uri: '{SERVER}'")],
        "",
        [],
        "FILE, line 8: tracking.uri: no MLflow server answers at http://user:***@127.0.0.1:9 "
        "(Connection refused); start it, or leave tracking.uri out to keep results below the "
        "output",
    ),
    "tracking in a plain folder": (
        [("uri: none", "uri: ./mlruns")],
        "",
        [],
        "FILE, line 8: tracking.uri: MLflow keeps no runs in plain folders any more, got "
        "'./mlruns'; use sqlite:///absolute/path/mlflow.db, a server's http address, or leave it "
        "out",
    ),
    "YAML syntax": (
        [],
        "latency: {batch_sizes: [1\n",
        [],
        "FILE, line 10, column 1: not valid YAML: expected ',' or ']', but got '<stream end>' "
        "(while parsing a flow sequence that starts in line 9)",
    ),
    "key given twice": (
        [],
        "name: again\n",
        [],
        "FILE, line 9: name is given twice, first in line 1",
    ),
    "wrong type": ([], "seed: one\n", [], "FILE, line 9: seed must be an integer, got 'one'"),
    "unknown layer": (
        [],
        "targets:\n  - {op_names: [conv9]}\n",
        [],
        "FILE, line 9: targets.op_names: no layer 'conv9'; did you mean 'conv3' or 'conv2' or "
        "'conv1'?",
    ),
    "unknown layer type": (
        [],
        "targets:\n  - {op_types: [Conv3d]}\n",
        [],
        "FILE, line 9: targets.op_types: the model has no layer of type 'Conv3d', only Conv2d, "
        "Linear; did you mean 'Conv2d'?",
    ),
    "negative epochs": (
        [],
        "recover: {epochs: -1}\n",
        [],
        "FILE, line 9: recover.epochs must be above 0, got -1",
    ),
    "score of the wrong shape": (
        [(TASK, "bad_tasks:ScoreOfTheWrongShape")],
        "",
        [],
        "FILE: ScoreOfTheWrongShape.score must return one number for each example, a tensor of "
        "shape (2,) here, got ()",
    ),
    "loss is NaN": (
        [(TASK, "bad_tasks:LossIsNaN")],
        "",
        [],
        "FILE: LossIsNaN.loss must be finite, got nan on validation data",
    ),
    "nothing to do": (
        [("pruners:\n  - {type: L1Filter}\n", "")],
        "",
        [],
        "FILE: a job needs pruners, sensitivity or quantize",
    ),
    "no weights file": (
        [],
        "model: {weights: nowhere.safetensors}\n",
        [],
        "FILE, line 9: model.weights: no file nowhere.safetensors",
    ),
    "neither sparsity nor budget": (
        [(BUDGETS, "")],
        "",
        [],
        "FILE: L1Filter needs a sparsity for 'conv1': give L1Filter.sparsity, targets.sparsity, "
        "or a budget",
    ),
    "criterion that doesn't fit": (
        [("{type: L1Filter}", "{type: SimulatedAnnealing, criterion: level}")],
        "",
        [],
        "FILE, line 4: pruners[0].criterion: 'level' scores weights, and channels are pruned here; "
        f"allowed: {', '.join(n for n, c in CRITERIA.items() if c.kind == 'channels')}, "
        "or package.module:Class",
    ),
    "protected layer that isn't there": (
        [],
        "structure: {ignore: [conv9]}\n",
        [],
        "FILE, line 9: structure.ignore: no module is named 'conv9' or of that type",
    ),
    "name that is no folder's": (
        [("name: bad", "name: a/b")],
        "",
        [],
        "FILE, line 1: name must be usable as a folder's name, got 'a/b'",
    ),
    "several mistakes at once": (
        [("L1Filter", "L1Filter, sparsty: 1"), ("macs: 50%", "macs: 0%")],
        "sed: 1\n",
        [],
        "FILE, line 4: pruners[0].sparsty is no key of L1Filter; did you mean 'sparsity'?\n"
        "error: FILE, line 6: budgets[0].macs must be a percentage kept such as 50%, above 0% "
        "and at most 100%, or a number above 0, got '0%'\n"
        "error: FILE, line 9: sed is no key of a job; did you mean 'seed' or 'seeds'?",
    ),
    "output option is a file": (
        [],
        "",
        ["--output", "bad_tasks.py"],
        "--output: output CWD/bad_tasks.py can't be made: CWD/bad_tasks.py is a file",
    ),
    "override of the task": (
        [],
        "",
        ["--set", "task=bad_tasks:NotTask"],
        "--set task=bad_tasks:NotTask: task: module 'bad_tasks' has no 'NotTask'; did you mean "
        "'NotATask' or 'ToyTask'?",
    ),
    "override without a value": (
        [],
        "",
        ["--set", "cluster.replicas"],
        "--set cluster.replicas: must be KEY=VALUE, such as cluster.replicas=4 or "
        "budgets.0.macs=30%",
    ),
    "override out of a list": (
        [],
        "",
        ["--set", "pruners.3.type=Level"],
        "--set pruners.3.type=Level: pruners is a list and has no entry 3 (it has only 0)",
    ),
    "name that leaves the output": (
        [("name: bad", "name: ..")],
        "",
        [],
        "FILE, line 1: name must be usable as a folder's name, got '..'",
    ),
    "seeds given twice": ([], "seeds: [1, 1]\n", [], "FILE, line 9: seeds must differ, got [1, 1]"),
    "no examples in a batch": (
        [],
        "evaluation: {batch_size: 0}\n",
        [],
        "FILE, line 9: evaluation.batch_size must be at least 1, got 0",
    ),
    "latency of no batch": (
        [],
        "latency: {batch_sizes: [0]}\n",
        [],
        "FILE, line 9: latency.batch_sizes must be 1 or more, got [0]",
    ),
    "YAML that would make objects": (
        [(TASK, "!!python/object/apply:os.system ['true']")],
        "",
        [],
        "FILE, line 2: task must be plain data, got "
        "tag:yaml.org,2002:python/object/apply:os.system",
    ),
    "weights that would run code": (
        [],
        "model: {weights: TMP/hostile.pt}\n",
        [],
        "FILE, line 9: model.weights: TMP/hostile.pt isn't a state dict of tensors "
        "alone, and anything else could run code when it is loaded; save "
        "model.state_dict() instead",
    ),
    "weights of another model": (
        [],
        "model: {weights: TMP/other.safetensors}\n",
        [],
        "FILE, line 9: model.weights: TMP/other.safetensors doesn't fit ToyNet: it "
        "lacks 'conv1.weight' and 22 more",
    ),
    "weights that are damaged": (
        [],
        "model: {weights: TMP/job.yaml}\n",
        [],
        "FILE, line 9: model.weights: TMP/job.yaml isn't a state dict of tensors alone, "
        "and anything else could run code when it is loaded; save model.state_dict() "
        "instead",
    ),
    "model can't be built": (
        [(TASK, "bad_tasks:NoModel")],
        "",
        [],
        "FILE, line 2: task bad_tasks:NoModel: build_model failed: FileNotFoundError: "
        "no such checkpoint: resnet.pt",
    ),
    "model is no module": (
        [(TASK, "bad_tasks:NotAModule")],
        "",
        [],
        "FILE: NotAModule.build_model must return a torch.nn.Module, got dict",
    ),
    "data isn't there": (
        [(TASK, "bad_tasks:NoData")],
        "",
        [],
        "FILE: NoData.dataset('calibration') failed: OSError: no folder /data/calibration",
    ),
    "split is empty": (
        [(TASK, "bad_tasks:EmptySplit")],
        "",
        [],
        "FILE: EmptySplit.dataset('test') is empty",
    ),
    "data is a stream": (
        [(TASK, "bad_tasks:Streamed")],
        "",
        [],
        "FILE: Streamed.dataset('train') must be map-style (len() and [i]), got iterator",
    ),
    "example inputs don't fit": (
        [(TASK, "bad_tasks:WrongInputs")],
        "",
        [],
        "FILE: WrongInputs: the model doesn't fit WrongInputs.example_inputs(): "
        "RuntimeError: Given groups=1, weight of size [8, 2, 3, 3], expected input[2, "
        "7, 6, 6] to have 2 channels, but got 7 channels instead",
    ),
    "loss is no scalar": (
        [(TASK, "bad_tasks:LossForEachExample")],
        "",
        [],
        "FILE: LossForEachExample.loss must return a scalar tensor, got (2,)",
    ),
    "no replicas": (
        [(RAY, "{replicas: 0}")],
        "",
        [],
        "FILE, line 7: cluster.replicas must be above 0, got 0",
    ),
    "negative GPUs": (
        [(RAY, "{gpus: -1}")],
        "",
        [],
        "FILE, line 7: cluster.gpus must be 0 or more, got -1",
    ),
    "GPUs without Ray": (
        [(RAY, "{executor: local, gpus: 1}")],
        "",
        [],
        "FILE, line 7: cluster.gpus must be 0 with executor 'local', which runs on the "
        "CPU, got 1; executor 'ray' starts a local Ray by itself",
    ),
    "unknown executor": (
        [(RAY, "{executor: dask}")],
        "",
        [],
        "FILE, line 7: cluster.executor must be one of 'ray', 'local', got 'dask'",
    ),
    "no patience": (
        [(RAY, "{unit_timeout: 0}")],
        "",
        [],
        "FILE, line 7: cluster.unit_timeout must be above 0, got 0",
    ),
    "address of a dashboard": (
        [(RAY, "{address: 'http://127.0.0.1:8265'}")],
        "",
        [],
        "FILE, line 7: cluster.address must be host:port of a running cluster, got "
        "http://127.0.0.1:8265: submit the job there instead (raycompress submit, or "
        "ray job submit)",
    ),
    "no cluster at the address": (
        [(RAY, "{address: '127.0.0.1:9'}")],
        "",
        [],
        "FILE, line 7: cluster.address: no Ray cluster answers at 127.0.0.1:9; start "
        "it, or leave cluster.address and RAY_ADDRESS empty to run locally",
    ),
    "address without a port": (
        [(RAY, "{address: head}")],
        "",
        [],
        "FILE, line 7: cluster.address must be host:port of a running cluster, got 'head'",
    ),
    "tracking database not there": (
        [("uri: none", "uri: 'postgresql://me:secret@127.0.0.1:9/db'")],
        "",
        [],
        "FILE, line 8: tracking.uri: no database answers at "
        "postgresql://me:***@127.0.0.1:9/db (Connection refused); start it, or leave "
        "tracking.uri out to keep results below the output",
    ),
    "tracking port out of range": (
        [("uri: none", "uri: 'http://127.0.0.1:99999'")],
        "",
        [],
        "FILE, line 8: tracking.uri: Port out of range 0-65535: http://127.0.0.1:99999",
    ),
    "tracking file relative": (
        [("uri: none", "uri: 'sqlite:///mlflow.db'")],
        "",
        [],
        "FILE, line 8: tracking.uri: sqlite:///mlflow.db is relative to the current "
        "folder, which a submitted job loses; use sqlite:////absolute/path/mlflow.db, "
        "or leave it out",
    ),
    "registered model's name": (
        [("uri: none", "registered_model: a/b")],
        "",
        [],
        "FILE, line 8: tracking.registered_model must be a name that MLflow takes, "
        "without '/' and ':', got 'a/b'",
    ),
    "unknown quantizer": (
        [],
        "quantize: {type: LSG}\n",
        [],
        "FILE, line 9: quantize.type: no quantizer 'LSG'; did you mean 'LSQ'?",
    ),
    "bits out of range": (
        [],
        "quantize:\n  type: QAT\n  config_list: [{op_types: [Conv2d], quant_bits: 12}]\n",
        [],
        "FILE, line 11: quantize.config_list[0].quant_bits must be between 1 and 8 (32: float), "
        "got 12",
    ),
    "bits that a quantizer doesn't have": (
        [],
        "quantize: {type: QAT, lower: none, config_list: [{op_names: [conv1], quant_bits: 1}]}\n",
        [],
        "FILE, line 9: quantize: bits of the weight of 'conv1' must be an integer between 2 and 8, "
        "got 1; BNN and DoReFa have one bit",
    ),
    "quantized layer that isn't there": (
        [],
        "quantize: {type: QAT, lower: none, config_list: [{op_names: [conv9]}]}\n",
        [],
        "FILE, line 9: quantize.config_list[0].op_names: no layer 'conv9'; did you mean 'conv3' or "
        "'conv2' or 'conv1'?",
    ),
    "everything stays in float": (
        [],
        "quantize: {type: QAT, lower: none, config_list: [{op_types: [default], exclude: true}]}\n",
        [],
        "FILE, line 9: quantize.config_list excludes every layer that could be quantized",
    ),
    "layer type that can't be quantized": (
        [(TASK, "bad_tasks:Recurrent")],
        "quantize: {type: QAT, lower: none, config_list: [{op_types: [LSTM]}]}\n",
        [],
        "FILE, line 9: quantize.config_list[0].op_types: LSTM can't be quantized; those that can "
        "are Linear, Conv1d, Conv2d, Conv3d",
    ),
    "part that a quantizer leaves in float": (
        [],
        "quantize: {type: Naive, lower: none, config_list: "
        "[{op_names: [conv1], quant_bits: {input: 8}}]}\n",
        [],
        "FILE, line 9: quantize: NaiveQuantizer quantizes no input, got 8 bits: conv1; quant_types "
        "may be weight",
    ),
    "quantizer that must be trained": (
        [],
        "quantize: {type: DoReFa, lower: none}\n",
        [],
        "FILE, line 9: quantize.training is missing: DoReFa computes nothing useful before it is "
        "trained; give training: {epochs: 3}",
    ),
    "quantizer that isn't trained": (
        [],
        "quantize: {type: Naive, lower: none, training: {epochs: 2}}\n",
        [],
        "FILE, line 9: quantize.training must be left out: NaiveQuantizer isn't trained, got "
        "epochs 2; QAT and LSQ are",
    ),
    "start beyond the training": (
        [],
        "quantize: {type: QAT, lower: none, training: {epochs: 1}, config_list: "
        "[{op_names: [conv1], quant_start_step: 1000}]}\n",
        [],
        "FILE, line 9: quantize: quant_start_step 1000 of 'conv1' is beyond the "
        "training, which has 3 steps; train longer or start earlier",
    ),
    "unknown backend": (
        [],
        "quantize: {type: QAT, lower: tflite}\n",
        [],
        f"FILE, line 9: quantize.lower must be one of {', '.join((*BACKENDS, 'none'))}, got "
        "'tflite'",
    ),
    "bits that onnxruntime has no kernel for": (
        [],
        "quantize: {type: LSQ, lower: onnx}\n",
        [],
        "FILE, line 9: quantize.lower: onnx computes in 8 bits, and the weight of 'conv2' has 4; "
        "lower: packed stores any number of bits, and runs in simulation",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, tmp_path, monkeypatch):
    replacements, end, arguments, expected = CASES[case]
    text = BASE + end
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    text = text.replace("TMP", str(tmp_path))
    torch.save({"weight": Path}, tmp_path / "hostile.pt")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    job = tmp_path / "job.yaml"
    job.write_text(text)
    monkeypatch.chdir(HERE)
    output = [] if "output:" in text else ["--output", str(tmp_path / "out")]

    def refuse(*args, **kwargs):
        raise AssertionError("Ray was started")

    import ray

    monkeypatch.setattr(ray, "init", refuse)
    before = set(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["run", str(job), *output, *arguments])
    expected = (
        expected.replace("FILE", str(job)).replace("CWD", str(HERE)).replace("TMP", str(tmp_path))
    )
    assert done.output == f"error: {expected}\n"
    assert done.exit_code == 2
    assert set(tmp_path.iterdir()) == before  # nothing half-written


def test_traceback_only_with_debug(tmp_path):
    arguments = ["run", str(tmp_path / "none.yaml")]
    assert "Traceback" not in CliRunner().invoke(app, arguments).output
    error = CliRunner().invoke(app, [*arguments, "--debug"]).exception
    assert type(error).__name__ == "ConfigError"


def test_nothing_heavy_is_imported_for_a_bad_job(tmp_path):
    import subprocess

    (tmp_path / "job.yaml").write_text(BASE.replace("50%", "0.1%"))
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom raycompress.cli import app\n"
        "done = CliRunner().invoke(app, ['run', 'job.yaml', '--output', 'out'])\n"
        "assert done.exit_code == 2, done.output\n"
        "assert not {'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
