"""NVIDIA's client, unmodified, in the process of our own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton
from tercet.card import Card, Feature, Rows, read_card
from tercet.client import Client

import models
from tests.conftest import Service

pytestmark = pytest.mark.slow


@pytest.fixture
def client(service: Service) -> Iterator[Any]:
    """A client of the service."""
    with triton.InferenceServerClient(service.address) as opened:
        yield opened


def tensor(card: Card, rows: Rows) -> Any:
    """The input of a request."""
    tensor_ = triton.InferInput(card.input.name, rows.shape, card.input.datatype)
    tensor_.set_data_from_numpy(rows)
    return tensor_


def test_server(client: Any) -> None:
    """The server is live and ready, and reports its name."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata().name == "tercet"


@pytest.mark.parametrize("name", models.names())
def test_metadata(client: Any, workspace: Path, service: Service, name: str) -> None:
    """A model is ready, in its version only, and its metadata is that of the card."""
    card = read_card(workspace / "models" / name)
    assert client.is_model_ready(name)
    assert client.is_model_ready(name, card.version)
    metadata = client.get_model_metadata(name)
    assert (metadata.name, list(metadata.versions)) == (name, [card.version])
    assert service.engine.removesuffix("runtime") in metadata.platform
    for found, expected in zip((*metadata.inputs, *metadata.outputs), (card.input, card.output), strict=True):
        assert (found.name, found.datatype, list(found.shape)) == (expected.name, expected.datatype, [-1, *expected.shape])


@pytest.mark.parametrize("name", models.names())
def test_config_has_the_texts_of_the_card(client: Any, workspace: Path, name: str) -> None:
    """A remote client can read a model's description, warning, labels, units and ranges."""
    card = read_card(workspace / "models" / name)
    texts = {key: parameter.string_value for key, parameter in client.get_model_config(name).config.parameters.items()}
    assert (texts["description"], texts["intended_use"], texts["warning"]) == (card.description, card.intended_use, card.warning)
    assert json.loads(texts["labels"]) == list(card.labels)
    assert msgspec.json.decode(texts["features"], type=tuple[Feature, ...]) == card.input.features


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
@pytest.mark.parametrize("named_output", [False, True])
def test_infer(client: Any, service: Service, workspace: Path, name: str, batch: int, *, named_output: bool) -> None:
    """It gets raw contents, the id that it sent, the requested outputs, and the same numbers as our client."""
    card = read_card(workspace / "models" / name)
    rows = np.resize(card.example_rows(), (batch, *card.input.shape))
    outputs = [triton.InferRequestedOutput(card.output.name)] if named_output else None
    result = client.infer(name, [tensor(card, rows)], outputs=outputs, request_id=f"{name}/{batch}", model_version=card.version)
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == (f"{name}/{batch}", name, card.version)
    assert [output.name for output in response.outputs] == [card.output.name]
    assert [len(content) for content in response.raw_output_contents] == [result.as_numpy(card.output.name).nbytes]
    with Client(service.address) as ours:
        np.testing.assert_array_equal(result.as_numpy(card.output.name), ours.infer(name, rows))


@pytest.mark.parametrize("name", models.names())
def test_unknown_output(client: Any, workspace: Path, name: str) -> None:
    """An unknown output is an error that names the right one."""
    card = read_card(workspace / "models" / name)
    with pytest.raises(triton.InferenceServerException, match=card.output.name) as caught:
        client.infer(name, [tensor(card, card.example_rows())], outputs=[triton.InferRequestedOutput("nope")])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_unknown_model(client: Any) -> None:
    """An unknown model is an error, and not just not ready."""
    with pytest.raises(triton.InferenceServerException, match="the models are") as caught:
        client.is_model_ready("nope")
    assert caught.value.status() == "StatusCode.NOT_FOUND"
