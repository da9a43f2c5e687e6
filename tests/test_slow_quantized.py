"""Jobs from pruning to integers on runtimes, with replicas on Ray."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raycompress.errors import ConfigError
from raycompress.quantization.lowering import lowering
from raycompress.quantization.lowering.inductor import load_inductor
from raycompress.results import JobResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent
JOB = """\
name: digits-quantized
task: jobs.tasks.digits:Digits
model: {pretrain: {epochs: 6}}
pruners:
  - {type: L1Filter, round_to: 16}
budgets:
  - {macs: 50%}
recover: {epochs: 3, lr: 0.02}
quantize: {type: QAT, training: {epochs: 2, lr: 0.01}, lower: onnx}
latency: {batch_sizes: [1, 32], repeats: 10}
"""


def finished(text, folder):
    """The result of a job that runs as its own process."""
    (folder / "job.yaml").write_text(text)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "raycompress", "run", str(folder / "job.yaml")),
            *("--output", str(folder / "out"), "--json", "--quiet"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # What exporters have to say is none of the user's business.
    assert "Skipping" not in done.stderr and "LeafSpec" not in done.stderr
    return JobResult.from_json(done.stdout)


@pytest.fixture(params=["onnx", "inductor"])
def backend(request):
    try:
        lowering(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


def test_prune_finetune_slim_quantize_lower(tmp_path, backend):
    (trial,) = finished(JOB.replace("lower: onnx", f"lower: {backend}"), tmp_path).trials
    assert [row.name for row in trial.rows] == ["dense", "masked", "slim", "quantized", "lowered"]
    slim, lowered, found = trial.row("slim"), trial.row("lowered"), trial.quantized
    assert found.layers_integer == found.layers_asked > 5 and found.runs == "integers"
    assert lowered.score_test > slim.score_test - 0.03 and slim.score_test > 0.9
    assert found.agreement > 0.97 and found.difference < 0.1
    assert found.file_bytes < 0.6 * found.float_bytes
    assert [row.batch_size for row in found.float_latency] == [1, 32]
    assert [row.batch_size for row in lowered.latency] == [1, 32]
    suffix = {"onnx": "onnx", "inductor": "pt2"}[backend]
    assert {path.name for path in Path(found.folder).iterdir()} >= {
        *(f"quantized.{suffix}", f"float.{suffix}", "layers.parquet", "layers.png"),
        *("calibration.json", "calibration.safetensors"),
    }
    if backend == "inductor":
        model = load_inductor(found.file)
        assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 10)
        return
    # MLflow loads it with onnxruntime, at another batch size, without this library.
    code = (
        "import sys, mlflow.pyfunc, numpy; mlflow.set_tracking_uri(sys.argv[1]);"
        "m = mlflow.pyfunc.load_model(sys.argv[2]); x = numpy.zeros((5, 1, 8, 8), 'float32');"
        "print(next(iter(m.predict(x).values())).shape); assert 'raycompress' not in sys.modules"
    )
    uri = f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}"
    loaded = subprocess.run(
        [sys.executable, "-c", code, uri, found.model], capture_output=True, text=True
    )
    assert loaded.stdout.splitlines()[-1:] == ["(5, 10)"], loaded.stderr


def test_layers_in_integers_within_a_limit_on_measured_latency(tmp_path):
    """From timings before the trials to a file within the limit, in one job."""
    pytest.importorskip("onnxruntime")
    job = (
        JOB[: JOB.index("pruners:")]
        + """\
pruners:
  - {type: MixedPrecision, weight_bits: [8, 32], latency_ms: 90%, batch_size: 32, batches: 2}
quantize: {type: PTQ, lower: onnx}
latency: {batch_sizes: [32], repeats: 10}
"""
    )
    (trial,) = finished(job, tmp_path).trials
    lowered, found = trial.row("lowered"), trial.quantized
    assert 0 < found.num_layers and found.layers_integer == found.layers_asked == found.num_layers
    assert lowered.score_test > trial.row("dense").score_test - 0.02
    ((own,), (in_float,)) = lowered.latency, found.float_latency
    # As timed in the search; here on a machine that may be at something else meanwhile.
    assert own.p10_ms < 1.1 * in_float.p10_ms
