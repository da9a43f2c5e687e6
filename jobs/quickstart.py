"""The quick start as a driver script: `python -m jobs.quickstart`, or through `ray job submit`."""

from __future__ import annotations

from pathlib import Path

import raycompress
from raycompress.progress import progress_for

if __name__ == "__main__":
    result = raycompress.run(Path(__file__).with_suffix(".yaml"), progress=progress_for())
    for trial in result.trials:
        dense, slim = result.dense, trial.rows[-1]
        print(
            f"{trial.name}: {dense.macs:,} -> {slim.macs:,} MACs, test accuracy "
            f"{dense.score_test:.4f} -> {slim.score_test:.4f}"
        )
