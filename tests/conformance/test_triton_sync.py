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


@pytest.fixture
def client(service: Service) -> Iterator[Any]:
    """A client of the service."""
    with triton.InferenceServerClient(service.address) as opened:
        yield opened


def tensor(card: Card, rows: Rows) -> Any:
    """The input of a request."""
    given = triton.InferInput(card.input.name, rows.shape, card.input.datatype)
    given.set_data_from_numpy(rows)
    return given


def test_server(client: Any) -> None:
    """The server is live, ready, and has its name."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata().name == "tercet"


@pytest.mark.parametrize("name", models.names())
def test_metadata(client: Any, workspace: Path, service: Service, name: str) -> None:
    """A model is ready, in its version only, and its metadata are those of the card."""
    card = read_card(workspace / "models" / name)
    assert client.is_model_ready(name)
    assert client.is_model_ready(name, card.version)
    metadata = client.get_model_metadata(name)
    assert (metadata.name, list(metadata.versions)) == (name, [card.version])
    assert service.engine.removesuffix("runtime") in metadata.platform
    for found, expected in zip((*metadata.inputs, *metadata.outputs), (card.input, card.output), strict=True):
        assert (found.name, found.datatype, list(found.shape)) == (expected.name, expected.datatype, [-1, *expected.shape])


@pytest.mark.parametrize("name", models.names())
def test_config_tells_what_the_card_says(client: Any, workspace: Path, name: str) -> None:
    """A client of another machine learns a model's description, warning, labels, units and ranges."""
    card = read_card(workspace / "models" / name)
    told = {key: parameter.string_value for key, parameter in client.get_model_config(name).config.parameters.items()}
    assert (told["description"], told["intended_use"], told["warning"]) == (card.description, card.intended_use, card.warning)
    assert json.loads(told["labels"]) == list(card.labels)
    assert msgspec.json.decode(told["features"], type=tuple[Feature, ...]) == card.input.features


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
@pytest.mark.parametrize("ask", [False, True])
def test_infer(client: Any, service: Service, workspace: Path, name: str, batch: int, *, ask: bool) -> None:
    """It gets raw contents, the id that it sent, the outputs that it asked for, and the numbers that our client gets."""
    card = read_card(workspace / "models" / name)
    rows = np.resize(card.example_rows(), (batch, *card.input.shape))
    outputs = [triton.InferRequestedOutput(card.output.name)] if ask else None
    result = client.infer(name, [tensor(card, rows)], outputs=outputs, request_id=f"{name}/{batch}", model_version=card.version)
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == (f"{name}/{batch}", name, card.version)
    assert [output.name for output in response.outputs] == [card.output.name]
    assert [len(content) for content in response.raw_output_contents] == [result.as_numpy(card.output.name).nbytes]
    with Client(service.address) as ours:
        np.testing.assert_array_equal(result.as_numpy(card.output.name), ours.infer(name, rows))


@pytest.mark.parametrize("name", models.names())
def test_unknown_output(client: Any, workspace: Path, name: str) -> None:
    """An output that there is not is refused, with the name of the one that there is."""
    card = read_card(workspace / "models" / name)
    with pytest.raises(triton.InferenceServerException, match=card.output.name) as caught:
        client.infer(name, [tensor(card, card.example_rows())], outputs=[triton.InferRequestedOutput("nope")])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_unknown_model(client: Any) -> None:
    """A model that there is not is an error, and never just not ready."""
    with pytest.raises(triton.InferenceServerException, match="known are") as caught:
        client.is_model_ready("nope")
    assert caught.value.status() == "StatusCode.NOT_FOUND"
