"""Every quantizer that a job can name keeps the contract."""

from typing import ClassVar

from raycompress.quantization import BNN, LSQ, PTQ, QAT, DoReFa, NaiveQuantizer
from raycompress.testing import QuantizerContract


class TestNaive(QuantizerContract):
    quantizer: ClassVar = NaiveQuantizer()


class TestPTQ(QuantizerContract):
    quantizer: ClassVar = PTQ()


class TestQAT(QuantizerContract):
    quantizer: ClassVar = QAT()


class TestQATPlain(QuantizerContract):
    quantizer: ClassVar = QAT(per_channel=False, fold_norms=False, weight_bits=4, input_bits=4)


class TestDoReFa(QuantizerContract):
    quantizer: ClassVar = DoReFa(weight_bits=2, activation_bits=4)


class TestBNN(QuantizerContract):
    quantizer: ClassVar = BNN()


class TestLSQ(QuantizerContract):
    quantizer: ClassVar = LSQ()
