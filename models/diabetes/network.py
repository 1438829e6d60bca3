"""Two networks for eight measurements with missing values; the preprocessing is part of the network."""

import torch
from torch import Tensor, nn

from models.network import Classifier

ZERO_IS_MISSING = (False, True, True, True, True, True, False, False)  # glucose, blood pressure, skin, insulin, BMI
INDICATED = [column for column, indicated in enumerate(ZERO_IS_MISSING) if indicated]


class Network(Classifier):
    """Measurements -> missing ones replaced by the training median -> standardised -> layers -> P(positive).

    `missing_indicators`: 8 measurements and 5 missing-value indicators - `hidden` tanh - 1.
    `tutorial`: 8 - 6 sigmoid - 4 sigmoid - 1, without indicators; `hidden` has no effect.
    Raises ValueError for another name.
    """

    def __init__(self, *, name: str = "missing_indicators", hidden: int = 16) -> None:
        super().__init__()
        if name not in ("missing_indicators", "tutorial"):
            raise ValueError(f"name: expected missing_indicators or tutorial, got {name!r}")
        self.zero_is_missing = nn.Buffer(torch.tensor(ZERO_IS_MISSING), persistent=False)
        self.median: Tensor = nn.Buffer(torch.zeros(8))
        self.mean: Tensor = nn.Buffer(torch.zeros(8))
        self.scale: Tensor = nn.Buffer(torch.ones(8))
        self.indicators = name == "missing_indicators"
        if self.indicators:
            self.layers = nn.Sequential(nn.Linear(8 + len(INDICATED), hidden), nn.Tanh(), nn.Linear(hidden, 1))
        else:
            self.layers = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 1))

    def is_missing(self, inputs: Tensor) -> Tensor:
        return inputs.isnan() | (self.zero_is_missing & (inputs == 0))

    def adapt(self, inputs: Tensor) -> None:
        """Take median, mean and standard deviation of each measurement from the training rows, (batch, 8)."""
        self.median = inputs.masked_fill(self.is_missing(inputs), torch.nan).nanmedian(dim=0).values
        filled = torch.where(self.is_missing(inputs), self.median, inputs)
        self.mean, self.scale = filled.mean(dim=0), filled.std(dim=0)

    def outputs(self, inputs: Tensor) -> Tensor:
        """(batch, 8) measurements -> (batch, 2): softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)]."""
        missing = self.is_missing(inputs)
        x = (torch.where(missing, self.median, inputs) - self.mean) / self.scale  # (batch, 8)
        if self.indicators:
            x = torch.cat([x, missing[:, INDICATED].to(x.dtype)], dim=1)  # (batch, 13)
        positive = self.layers(x)  # (batch, 1)
        return torch.cat([torch.zeros_like(positive), positive], dim=1)  # (batch, 2)
