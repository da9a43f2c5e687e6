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


class NoModel(ToyTask):
    def build_model(self):
        raise FileNotFoundError("no such checkpoint: resnet.pt")


class NotAModule(ToyTask):
    def build_model(self):
        return {"weight": torch.ones(2)}


class NoData(ToyTask):
    def dataset(self, split):
        if split == "calibration":
            raise OSError(f"no folder /data/{split}")
        return super().dataset(split)


class EmptySplit(ToyTask):
    def dataset(self, split):
        return [] if split == "test" else super().dataset(split)


class Streamed(ToyTask):
    def dataset(self, split):
        return iter(super().dataset(split))


class WrongInputs(ToyTask):
    def example_inputs(self):
        return (torch.zeros(2, 7, 6, 6),)


class LossForEachExample(ToyTask):
    def loss(self, outputs, batch):
        return outputs.sum(1)


class RecurrentNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(6, 8, batch_first=True)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])


class Recurrent(ToyTask):
    def build_model(self):
        return RecurrentNet()
