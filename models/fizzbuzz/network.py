"""FizzBuzz as ten bits -> one hidden layer of sines -> four classes."""

import math

import torch
from torch import Tensor, nn

from models.network import Classifier

BITS = 10


class Network(Classifier):
    """A perceptron with one hidden layer over the bits of a number, each bit as -1 or +1.

    The hidden units are sines (Sitzmann et al. 2020): each bit shifts a unit's phase, so one unit can have period 3 or 5, which
    takes hundreds of ReLUs. Initial shifts are up to a quarter of a period.
    """

    def __init__(self, *, hidden: int) -> None:
        super().__init__()
        self.phases = nn.Linear(BITS, hidden)
        self.output = nn.Linear(hidden, 4)
        nn.init.uniform_(self.phases.weight, -math.pi / 2, math.pi / 2)
        nn.init.uniform_(self.phases.bias, -math.pi, math.pi)
        self.masks = nn.Buffer(2 ** torch.arange(BITS), persistent=False)

    def outputs(self, inputs: Tensor) -> Tensor:
        """(batch,) integers from 0 to 1023 -> logits, (batch, 4)."""
        bits = (inputs.unsqueeze(1) & self.masks) != 0  # (batch, 10)
        outputs: Tensor = self.output(torch.sin(self.phases(bits.float() * 2 - 1)))  # (batch, 4)
        return outputs
