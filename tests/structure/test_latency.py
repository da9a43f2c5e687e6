from __future__ import annotations

import torch
from architectures import Plain

from raycompress.structure import analyze, file_size, measure, slim


def test_rows_for_each_model_and_batch_size() -> None:
    model = Plain().train()
    structure = analyze(model, (torch.zeros(2, 3, 8, 8),))
    small = slim(model, structure, {"0.0": [1, 2]})
    rows = measure(
        {"dense": model, "slim": small}, (torch.zeros(2, 3, 8, 8),), batch_sizes=(1, 5), repeats=3
    )
    assert [(r.name, r.batch_size, r.repeats) for r in rows] == [
        ("dense", 1, 3), ("slim", 1, 3), ("dense", 5, 3), ("slim", 5, 3),
    ]  # fmt: skip
    assert all(0 < r.p10_ms <= r.median_ms <= r.p90_ms for r in rows)
    assert model.training
    assert file_size(small) < file_size(model)
