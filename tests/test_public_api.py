import subprocess
import sys

import raycompress
import raycompress.quantization


def test_names_are_pinned_and_load():
    assert raycompress.__all__ == [
        "ClassificationTask",
        "JobConfig",
        "JobResult",
        "L1Filter",
        "Level",
        "Masks",
        "Materialized",
        "Pruner",
        "RaycompressError",
        "SimulatedAnnealing",
        "Split",
        "Target",
        "Task",
        "TaskError",
        "analyze",
        "config_list",
        "hold",
        "load",
        "load_masks",
        "masked_copy",
        "materialize",
        "run",
        "save",
        "save_masks",
        "slim",
        "split_indices",
        "verify",
    ]
    for name in raycompress.__all__:
        assert getattr(raycompress, name) is not None


def test_names_of_quantization_are_pinned():
    assert raycompress.quantization.__all__ == [
        "BNN",
        "LSQ",
        "PTQ",
        "QAT",
        "QUANTIZERS",
        "Bits",
        "DoReFa",
        "NaiveQuantizer",
        "QuantTarget",
        "Quantization",
        "Quantizer",
        "choices_of",
        "export_calibration",
        "load_calibration",
        "quant_config_list",
    ]
    for name in raycompress.quantization.__all__:
        assert getattr(raycompress.quantization, name) is not None


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, raycompress, raycompress.cli; assert 'torch' not in sys.modules; "
        "import raycompress.pruning, raycompress.quantization, raycompress.job; "
        "import raycompress.driver; raycompress.run; "
        "assert not {'ray', 'mlflow'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
