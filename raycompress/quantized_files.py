"""Files beside a quantized model: its scales and zero points, and the errors of its layers."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
from torch import nn

from raycompress.errors import ConfigError
from raycompress.lowered import cpu_splits
from raycompress.plan import Plan
from raycompress.quantization.calibration import export_calibration
from raycompress.quantization.layer_errors import LayerError, layer_errors

__all__ = ["read_layer_errors", "write_quantized_files"]

LAYERS = "layers.parquet"


def write_quantized_files(plan: Plan, model: nn.Module, folder: Path) -> str:
    """Writes calibration files, and a table of ranges and errors measured on calibration data.

    Args:
        plan: Of a job with `quantize`.
        model: Quantized, in eval mode, on the CPU.
        folder: Is made.

    Returns:
        Why there are no calibration files; "" if there are.
    """
    assert plan.quantize is not None
    folder.mkdir(parents=True, exist_ok=True)
    batches = cpu_splits(plan).calibration(plan.quantize.section.batches)
    rows = [vars(row) for row in layer_errors(model, plan.task.forward, batches)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / LAYERS)
    try:
        export_calibration(model, folder)
    except ConfigError as error:  # BNN and DoReFa have no scales
        return str(error)
    return ""


def read_layer_errors(folder: Path) -> list[LayerError]:
    """The rows of the table that `write_quantized_files` wrote; none if there is no table."""
    if not (folder / LAYERS).exists():
        return []
    table = pyarrow.parquet.read_table(folder / LAYERS)
    return [LayerError(**row) for row in table.to_pylist()]
