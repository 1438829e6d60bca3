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
from pipeline.export import to_onnx
from pipeline.stage import PipelineError
from pipeline.train import build

TUTORIAL_MLP = sum((size + 1) * following for size, following in pairwise((784, 512, 256, 128, 64, 10)))

every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> Predictor:
    """A network, untrained, in evaluation mode."""
    torch.manual_seed(0)
    return build("mnist", name).eval()


@cache
def exported(name: str) -> bytes:
    """Its ONNX file."""
    return to_onnx(made(name), CONTRACT, torch.zeros(2, *CONTRACT.input.shape, dtype=torch.uint8), 20).SerializeToString()


def parameters(network: Predictor) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in network.parameters())


@every_network
def test_every_network_gives_the_same_answers_as_its_onnx_file(name: str) -> None:
    """At any batch size its graph gives the contract's tensors and its own probabilities."""
    network, digits = made(name), torch.randint(0, 256, (7, *CONTRACT.input.shape), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(exported(name), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        (answers,) = session.run([CONTRACT.output.name], {CONTRACT.input.name: digits[:batch].numpy()})
        assert answers.shape == (batch, *CONTRACT.output.shape)
        with torch.inference_mode():
            np.testing.assert_allclose(answers, network(digits[:batch]).numpy(), rtol=0, atol=1e-5)


@every_network
def test_every_network_can_be_trained(name: str) -> None:
    """Each parameter has a gradient after one batch of varied digits."""
    network, digits = made(name).train(), torch.randint(0, 256, (8, *CONTRACT.input.shape), dtype=torch.uint8)
    network.outputs(network.augment(digits)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_tiny_is_tiny() -> None:
    """At most 8,000 parameters, and 40 KB of ONNX with the preprocessing in it."""
    assert parameters(made("tiny")) <= 8000
    assert len(exported("tiny")) <= 40_000


def test_mlp_is_the_tutorials() -> None:
    """784-512-256-128-64-10, each layer with a bias."""
    assert parameters(made("mlp")) == TUTORIAL_MLP == 575_050


def test_an_unknown_network_is_named_beside_the_known_ones() -> None:
    """The network raises ValueError, and the pipeline says which entry of params.yaml is wrong."""
    known = "there is no network 'cnnn'; use cnn, mlp, inception, tiny, record"
    with pytest.raises(ValueError, match=known):
        Network(name="cnnn")
    with pytest.raises(PipelineError, match=f"params.yaml: models.mnist.train.network: {known}"):
        build("mnist", "cnnn")
