"""A job from pruning to integers on onnxruntime, with replicas on Ray."""

import subprocess
import sys
from pathlib import Path

import pytest

from raycompress.quantization.lowering import BACKENDS
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


@pytest.mark.skipif("onnx" not in BACKENDS, reason="no backend onnx")
def test_prune_finetune_slim_quantize_lower(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "raycompress", "run", str(tmp_path / "job.yaml")),
            *("--output", str(tmp_path / "out"), "--json", "--quiet"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (trial,) = JobResult.from_json(done.stdout).trials
    assert [row.name for row in trial.rows] == ["dense", "masked", "slim", "quantized", "lowered"]
    slim, lowered, found = trial.row("slim"), trial.row("lowered"), trial.quantized
    assert found.layers_integer == found.layers_asked > 5 and found.runs == "integers"
    assert lowered.score_test > slim.score_test - 0.03 and slim.score_test > 0.9
    assert found.agreement > 0.97 and found.difference < 0.1
    assert found.file_bytes < 0.6 * found.float_bytes
    assert {path.name for path in Path(found.folder).iterdir()} >= {
        *("quantized.onnx", "float.onnx", "layers.parquet", "layers.png"),
        *("calibration.json", "calibration.safetensors"),
    }
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
