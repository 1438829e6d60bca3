"""What the pipeline and the torch engine expect of a network."""

from typing import Any

import torch
from torch import Tensor, nn

import models


class Predictor(nn.Module):
    """A network that predicts values from raw inputs; it is trained with the mean squared error.

    A subclass is called `Network` and is defined in `models/<name>/network.py`. It implements `outputs` and what else it needs.
    """

    def is_missing(self, inputs: Tensor) -> Tensor:
        """Which inputs have no value: booleans of the same shape."""
        return inputs.isnan()

    def adapt(self, inputs: Tensor) -> None:
        """Fit the statistics of the preprocessing (means, scales) to the training rows; they become buffers of the state_dict."""

    def solve(self, inputs: Tensor, targets: Tensor) -> None:
        """Compute the weights from the training rows and their targets; gradient descent, if any, starts from there."""

    def augment(self, inputs: Tensor) -> Tensor:
        """Return a random variation of a training batch, of the same shape and in the units of the input tensor."""
        return inputs

    def outputs(self, inputs: Tensor) -> Tensor:
        """(batch, ...) inputs as the contract describes them -> values or logits for the loss, (batch, *output)."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, ...) -> predictions, (batch, *output)."""
        return self.outputs(inputs)


class Classifier(Predictor):
    """A network whose `outputs` are logits and whose predictions are probabilities; it is trained with the cross entropy."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, ...) -> probabilities, (batch, classes); each row sums to one."""
        return torch.softmax(self.outputs(inputs), dim=1)


class Outputs(nn.Module):
    """Wraps a network so that calling it returns `outputs`, for torch functions that only call modules."""

    def __init__(self, network: Predictor) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network.outputs(inputs)


def build(model: str, network: str | dict[str, Any]) -> Predictor:
    """Build a model's untrained network from `train.network` in params.yaml: keywords, or a string that is short for `name: ...`.

    Raises models.UnknownModelError, and TypeError or ValueError when the network does not accept these keywords.
    """
    built: Predictor = models.load(model, "network").Network(**({"name": network} if isinstance(network, str) else network))
    return built
