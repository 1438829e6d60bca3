"""The tutorial's 8-6-4-1 sigmoid net, with the preprocessing it was missing inside the graph."""

import torch
from torch import Tensor, nn

from models.network import Classifier

ZERO_IS_MISSING = (False, True, True, True, True, True, False, False)  # glucose, blood pressure, skin, insulin, BMI


class Network(Classifier):
    """Measurements -> missing ones replaced by the training median -> standardised -> 8-6-4-1 -> P(positive)."""

    zero_is_missing: Tensor
    median: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero_is_missing", torch.tensor(ZERO_IS_MISSING), persistent=False)
        self.register_buffer("median", torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scale", torch.ones(8))
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 1))

    def missing(self, inputs: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8): where a measurement was not taken."""
        return inputs.isnan() | (self.zero_is_missing & (inputs == 0))

    def adapt(self, inputs: Tensor) -> None:
        """Take median, mean and standard deviation of each measurement from the training rows, (batch, 8)."""
        self.median = inputs.masked_fill(self.missing(inputs), torch.nan).nanmedian(dim=0).values
        filled = torch.where(self.missing(inputs), self.median, inputs)
        self.mean, self.scale = filled.mean(dim=0), filled.std(dim=0)

    def logits(self, inputs: Tensor) -> Tensor:
        """(batch, 8) measurements -> (batch, 2): softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)]."""
        filled = torch.where(self.missing(inputs), self.median, inputs)
        positive = self.layers((filled - self.mean) / self.scale)  # (batch, 1)
        return torch.cat([torch.zeros_like(positive), positive], dim=1)  # (batch, 2)
