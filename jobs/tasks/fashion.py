"""Fashion-MNIST: 70,000 grey images of 28x28, 10 classes.

The files come from the Debian package `dataset-fashion-mnist`, or from any folder with the four
`*-ubyte.gz` files in IDX format (`task_args: {root: ...}`).
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from raycompress import ClassificationTask, Split, TaskError, split_indices

ROOT = "/usr/share/datasets/fashion-mnist"
FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> Tensor:
    """Reads a gzipped IDX file of unsigned bytes."""
    with gzip.open(path) as file:
        data = file.read()
    if data[:3] != b"\0\0\x08":
        raise TaskError(f"{path} is no IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).copy()).view(
        *shape.tolist()
    )


class Fashion(ClassificationTask):
    """Fashion-MNIST in four disjoint splits: 10,000 training images are set apart for search.

    Args:
        root: Folder of the four files.
        size: Images are average-pooled to this many pixels a side: 28 or 14.
        num_train: Training images used; the rest of the training file is left out. At most 49,000.
        model: "residual", "vgg" or "hardtanh".
    """

    batch_size = 128
    lr = 0.1

    def __init__(
        self,
        root: str = ROOT,
        size: int = 28,
        num_train: int = 49_000,
        model: str = "residual",
    ) -> None:
        if model not in MODELS:
            raise TaskError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
        if size not in (28, 14):
            raise TaskError(f"size must be 28 or 14, got {size}")
        if not 1 <= num_train <= 49_000:
            raise TaskError(f"num_train must be between 1 and 49000, got {num_train}")
        self.root, self.size, self.num_train, self.model = root, size, num_train, model
        self._data: dict[str, tuple[Tensor, Tensor]] = {}
        sizes = {"validation": 10_000, "calibration": 1_000, "train": num_train}
        self.parts = split_indices(60_000, sizes)

    def build_model(self) -> nn.Module:
        return MODELS[self.model]()

    def dataset(self, split: Split) -> TensorDataset:
        images, labels = self._load("test" if split == "test" else "train")
        if split == "test":
            return TensorDataset(images, labels)
        part = self.parts[split]
        return TensorDataset(images[part], labels[part])

    def _load(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._data:
            paths = [
                Path(self.root) / f"{FILES[name]}-{kind}-ubyte.gz"
                for kind in ("images-idx3", "labels-idx1")
            ]
            for path in paths:
                if not path.exists():
                    raise TaskError(
                        f"{path} is not there: install the Debian package dataset-fashion-mnist, "
                        "or give the folder of its files as task_args.root"
                    )
            images = (read_idx(paths[0]).float().unsqueeze(1) / 255 - 0.286) / 0.353
            if self.size != 28:
                images = nn.functional.avg_pool2d(images, 28 // self.size)
            self._data[name] = (images, read_idx(paths[1]).long())
        return self._data[name]


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


class Block(nn.Module):
    """A basic residual block with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.conv2 = _conv(outputs, outputs)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(torch.relu(self.conv1(x)))
        return torch.relu(y + self.shortcut(x))


class FashionResNet(nn.Module):
    """Three residual stages of 16, 32 and 64 channels: 78,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 16, 2)
        self.stages = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.stem(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class FashionVGG(nn.Module):
    """Six convolutions of 16 to 64 channels, with max pooling between pairs."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 16, 32, 32, 64, 64]
        layers: list[nn.Module] = []
        for index in range(6):
            layers += [_conv(widths[index], widths[index + 1]), nn.ReLU()]
            if index in (1, 3):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits


class FashionHardtanh(nn.Module):
    """As FashionVGG, in the order of binary networks: convolution, pooling, norm, Hardtanh."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 16, 32, 32, 64, 64]
        layers: list[nn.Module] = []
        for index in range(6):
            layers.append(
                nn.Conv2d(widths[index], widths[index + 1], 3, padding=1, bias=False),
            )
            if index in (1, 3):
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(widths[index + 1]), nn.Hardtanh()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits


MODELS: dict[str, type[nn.Module]] = {
    "residual": FashionResNet,
    "vgg": FashionVGG,
    "hardtanh": FashionHardtanh,
}
