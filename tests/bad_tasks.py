"""Tasks that are wrong, each in its own way."""

import torch

from raycompress.testing import ToyTask


class ScoreOfTheWrongShape(ToyTask):
    def score(self, outputs, batch):
        return torch.tensor(1.0)


class LossIsNaN(ToyTask):
    def loss(self, outputs, batch):
        return outputs.sum() * float("nan")


class NotATask:
    pass
