"""The networks for digits that `models.mnist.train.network` may name."""

from functools import cache
from itertools import pairwise

import numpy as np
import onnxruntime
import pytest
import torch

from models.mnist.contract import CONTRACT
from models.mnist.network import NETWORKS, Network
from models.network import Predictor
from pipeline.common import PipelineError
from pipeline.export import to_onnx
from pipeline.train import build

TUTORIAL_MLP = sum((size + 1) * following for size, following in pairwise((784, 512, 256, 128, 64, 10)))

every_network = pytest.mark.parametrize("name", NETWORKS)


def built(name: str) -> Predictor:
    """A network, untrained, in evaluation mode."""
    torch.manual_seed(0)
    return build("mnist", name).eval()


@cache
def exported(name: str) -> bytes:
    """Its ONNX file."""
    return to_onnx(built(name), CONTRACT, torch.zeros(2, *CONTRACT.input.shape, dtype=torch.uint8), 20).SerializeToString()


def parameters(network: Predictor) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in network.parameters())


@every_network
def test_every_network_predicts_the_same_as_its_onnx_file(name: str) -> None:
    """At any batch size the graph has the contract's tensors and the network's probabilities."""
    network, digits = built(name), torch.randint(0, 256, (7, *CONTRACT.input.shape), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(exported(name), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        (predictions,) = session.run([CONTRACT.output.name], {CONTRACT.input.name: digits[:batch].numpy()})
        assert predictions.shape == (batch, *CONTRACT.output.shape)
        with torch.inference_mode():
            np.testing.assert_allclose(predictions, network(digits[:batch]).numpy(), rtol=0, atol=1e-5)


@every_network
def test_every_network_can_be_trained(name: str) -> None:
    """Each parameter has a gradient after one batch of varied digits."""
    network, digits = built(name).train(), torch.randint(0, 256, (8, *CONTRACT.input.shape), dtype=torch.uint8)
    network.outputs(network.augment(digits)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_tiny_is_tiny() -> None:
    """At most 8,000 parameters, and 40 KB of ONNX with the preprocessing in it."""
    assert parameters(built("tiny")) <= 8000
    assert len(exported("tiny")) <= 40_000


def test_mlp_is_the_tutorials() -> None:
    """784-512-256-128-64-10, each layer with a bias."""
    assert parameters(built("mlp")) == TUTORIAL_MLP == 575_050


def test_an_unknown_network_is_an_error() -> None:
    """The error lists the networks, and in the pipeline it names the entry of params.yaml."""
    expected = "name: expected one of cnn, mlp, inception, tiny, record, got 'cnnn'"
    with pytest.raises(ValueError, match=expected):
        Network(name="cnnn")
    with pytest.raises(PipelineError, match=f"params.yaml: models.mnist.train.network: {expected}"):
        build("mnist", "cnnn")
