"""Keys of a job's `quantize` besides those of the quantizer itself."""

from __future__ import annotations

from dataclasses import dataclass

from raycompress.config import TrainingConfig
from raycompress.errors import ConfigError
from raycompress.quantization.targets import QuantTarget

__all__ = ["QuantizeSection"]


@dataclass(frozen=True, kw_only=True)
class QuantizeSection:
    """Quantization of each final model: after it was fine-tuned and made slim.

    Attributes:
        config_list: Which layers, which of their parts, and bits (NNI's config_list); empty: as
            the quantizer chooses.
        training: Of the quantized model, with the task's own loop; None: it is calibrated alone.
        lower: Where it ends: "onnx" computes in integers on onnxruntime, "inductor" by torch's own
            compiler on x86; "packed": a file with as many bits as weights have, which runs in
            simulation; "none": it stays simulated.
        batches: Calibration batches, of the task's batch size.
        dense: Quantize the dense model as well, beside the pruned ones; without pruners it is.
    """

    config_list: tuple[QuantTarget, ...] = ()
    training: TrainingConfig | None = None
    lower: str = "onnx"
    batches: int = 8
    dense: bool = False

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ConfigError(f"batches must be at least 1, got {self.batches}")
