"""Quantizers: frozen dataclasses whose fields are their YAML keys."""

from raycompress.quantization.bnn import BNN
from raycompress.quantization.calibration import export_calibration, load_calibration
from raycompress.quantization.dorefa import DoReFa
from raycompress.quantization.lsq import LSQ
from raycompress.quantization.naive import NaiveQuantizer
from raycompress.quantization.ptq import PTQ
from raycompress.quantization.qat import QAT
from raycompress.quantization.quantizer import Bits, Quantization, Quantizer
from raycompress.quantization.targets import QuantTarget, choices_of, quant_config_list

__all__ = [
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

QUANTIZERS: dict[str, type[Quantizer]] = {
    "Naive": NaiveQuantizer,
    "PTQ": PTQ,
    "QAT": QAT,
    "DoReFa": DoReFa,
    "BNN": BNN,
    "LSQ": LSQ,
}
"""Those that a job can name without an import path."""
