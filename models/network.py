"""What the pipeline and the torch engine expect of a network."""

from typing import Any

import torch
from torch import Tensor, nn

import models


class Classifier(nn.Module):
    """A network that takes what a person has and answers with probabilities.

    A subclass is called `Network`, lives in `models/<name>/network.py` and is built by `build`.
    It implements `logits`; `adapt` and `augment` where it has preprocessing to fit or training rows to vary, and `solve` where its
    weights are found without gradients.
    """

    def adapt(self, inputs: Tensor) -> None:
        """Fit the statistics of the preprocessing (means, scales) to the training rows; they become buffers of the state_dict."""

    def solve(self, inputs: Tensor, targets: Tensor) -> None:
        """Compute the weights from the training rows and their classes, (rows,); gradient descent, if any, goes on from there."""

    def augment(self, inputs: Tensor) -> Tensor:
        """A random variation of a training batch, in the units of the input tensor and of the same shape."""
        return inputs

    def logits(self, inputs: Tensor) -> Tensor:
        """Unnormalised log-probabilities, (batch, classes), of a batch as the contract describes it."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """Probabilities, (batch, classes); each row sums to one."""
        return torch.softmax(self.logits(inputs), dim=1)


def build(model: str, network: str | dict[str, Any]) -> Classifier:
    """A model's network, untrained, as `train.network` in params.yaml wants it: keywords, or a name that stands for `name: ...`.

    Raises models.UnknownModelError, and TypeError or ValueError when the network does not take these keywords.
    """
    made: Classifier = models.load(model, "network").Network(**({"name": network} if isinstance(network, str) else network))
    return made
