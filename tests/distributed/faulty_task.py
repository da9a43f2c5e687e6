"""A task whose forward passes fail as often as there are files that say so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycompress.testing import ToyTask


class FaultyTask(ToyTask):
    """A toy task; whoever takes a file away, with a model whose conv1 is pruned, suffers its fault.

    `hang*`: a forward pass takes ten minutes. `short*`: it lacks memory. `small`: it lacks memory
    for as long as the file is there.

    Args:
        folder: Holds the files; not one of the plain attributes on which results depend.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Looks for a fault, then computes."""
        if model.conv1.out_channels < 8:  # type: ignore[union-attr]
            if _takes(self.folder, "hang*"):
                time.sleep(600)
            if _takes(self.folder, "short*") or (self.folder / "small").exists():
                torch.empty(1 << 50)  # a petabyte: "can't allocate memory"
        return super().forward(model, batch)


def _takes(folder: Path, pattern: str) -> bool:
    for path in sorted(folder.glob(pattern)):
        try:
            path.unlink()
        except FileNotFoundError:
            continue  # another process was faster
        return True
    return False
