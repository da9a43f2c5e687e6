"""Handwritten digits of scikit-learn (1,797 grey images of 8x8): nothing to download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from raycompress import ClassificationTask, Split, split_indices

SIZES = {"train": -1, "calibration": 128, "validation": 300, "test": 360}


class Block(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class DigitsNet(nn.Module):
    """A small residual network; 10 classes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block1 = Block(width)
        self.down = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.block2 = Block(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.down(self.block1(self.stem(x))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class Digits(ClassificationTask):
    """Digits in four disjoint splits, and a small residual network.

    Args:
        width: Channels of the first stage.
    """

    batch_size = 64
    lr = 0.05

    def __init__(self, width: int = 32) -> None:
        self.width = width
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.parts = split_indices(len(labels), SIZES)

    def build_model(self) -> nn.Module:
        return DigitsNet(self.width)

    def dataset(self, split: Split) -> TensorDataset:
        part = self.parts[split]
        return TensorDataset(self.images[part], self.labels[part])
