"""What the pipeline and the torch engine expect of a network."""

from typing import Any

import torch
from torch import Tensor, nn

import models


class Predictor(nn.Module):
    """A network that takes what a person has and answers with values; it is fitted by the mean squared error.

    A subclass is called `Network`, lives in `models/<name>/network.py` and is built by `build`.
    It implements `outputs`; `adapt` and `augment` where it has preprocessing to fit or training rows to vary, and `solve` where
    its weights are found without gradients.
    """

    def missing(self, inputs: Tensor) -> Tensor:
        """Where an input has no value: booleans of its shape."""
        return inputs.isnan()

    def adapt(self, inputs: Tensor) -> None:
        """Fit the statistics of the preprocessing (means, scales) to the training rows; they become buffers of the state_dict."""

    def solve(self, inputs: Tensor, targets: Tensor) -> None:
        """Compute the weights from the training rows and their targets; gradient descent, if any, goes on from there."""

    def augment(self, inputs: Tensor) -> Tensor:
        """A random variation of a training batch, in the units of the input tensor and of the same shape."""
        return inputs

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the loss is taken of, (batch, *output shape), for a batch as the contract describes it."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """The answers, (batch, *output shape)."""
        return self.outputs(inputs)


class Classifier(Predictor):
    """A network that answers with probabilities; it implements `logits`, and is fitted by the cross entropy."""

    def logits(self, inputs: Tensor) -> Tensor:
        """Unnormalised log-probabilities, (batch, classes), of a batch as the contract describes it."""
        raise NotImplementedError

    def outputs(self, inputs: Tensor) -> Tensor:
        """The logits."""
        return self.logits(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Probabilities, (batch, classes); each row sums to one."""
        return torch.softmax(self.logits(inputs), dim=1)


class Outputs(nn.Module):
    """A network whose call gives its `outputs`, for what only calls a network."""

    def __init__(self, network: Predictor) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, ...) -> what the loss is taken of, (batch, ...)."""
        return self.network.outputs(inputs)


def build(model: str, network: str | dict[str, Any]) -> Predictor:
    """A model's network, untrained, as `train.network` in params.yaml wants it: keywords, or a name that stands for `name: ...`.

    Raises models.UnknownModelError, and TypeError or ValueError when the network does not take these keywords.
    """
    made: Predictor = models.load(model, "network").Network(**({"name": network} if isinstance(network, str) else network))
    return made
