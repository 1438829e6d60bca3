"""FizzBuzz as ten bits -> one hidden layer -> four classes."""

import torch
from torch import Tensor, nn

from models.network import Classifier

BITS = 10


class Network(Classifier):
    """A multi-layer perceptron over the bits of a number, each bit as -1 or +1."""

    masks: Tensor

    def __init__(self, *, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(BITS, hidden), nn.ReLU(), nn.Linear(hidden, 4))
        self.register_buffer("masks", 2 ** torch.arange(BITS), persistent=False)

    def logits(self, inputs: Tensor) -> Tensor:
        """(batch,) integers from 0 to 1023 -> (batch, 4)."""
        bits = (inputs.unsqueeze(1) & self.masks) != 0  # (batch, 10)
        logits: Tensor = self.layers(bits.float() * 2 - 1)  # (batch, 4)
        return logits
