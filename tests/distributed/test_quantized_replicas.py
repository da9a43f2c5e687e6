"""Quantized candidates on replicas are those of this process, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import Toy

from raycompress.candidate import Candidate, Training
from raycompress.config import ClusterConfig
from raycompress.distributed.pool import ReplicaPool
from raycompress.distributed.spec import PackedWeights
from raycompress.executor import LedgerExecutor
from raycompress.quantization import QAT, Quantization
from raycompress.quantization.quantizer import Bits
from raycompress.weights import digest_of_state

pytestmark = pytest.mark.usefixtures("cluster")

HOW = Quantization.of(QAT(), dict.fromkeys(("conv2", "conv3", "fc"), Bits(weight=4, input=8)), 2)


def answered(toy: Toy, executor: LedgerExecutor) -> list[object]:
    """Calibrated, trained, and what was trained, slim and dense."""
    slim = replace(toy.candidate(9), quantize=HOW)
    asked = [
        slim,
        Candidate(toy.digest, quantize=HOW),
        slim.with_training(Training(0.3)),
        slim.with_training(Training(0.0)),
    ]
    trials = executor.evaluate(asked)
    trials += executor.evaluate([Candidate(trials[2].trained())])
    assert trials[4].shards == trials[2].shards
    return [(trial.shards, trial.weights, trial.failure) for trial in trials]


def test_one_and_two_replicas_answer_as_one_process(
    toy: Toy, few: Callable[..., ClusterConfig]
) -> None:
    local = toy.local()
    expected = answered(toy, local)
    for replicas in (1, 2):
        with ReplicaPool(toy.spec(), few(replicas)) as pool:
            pool.publish(toy.ranking)
            assert answered(toy, pool) == expected
            assert pool.dfe == local.dfe


def test_quantized_weights_travel_with_how_they_are_quantized(toy: Toy) -> None:
    local = toy.local()
    asked = Candidate(toy.digest, quantize=HOW, training=Training(0.0))
    stored = local.store.get(local.evaluate([asked])[0].trained())
    sent = PackedWeights.pack("w", stored).unpack()
    assert digest_of_state(sent) == digest_of_state(stored)
    assert sent.quantization == stored.quantization is not None
