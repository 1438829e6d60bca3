"""NVIDIA's asyncio client, unmodified: the calls of the synchronous one, and streams."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tercet.card import read_card
from tritonclient.utils import InferenceServerException

import models
from tests.conformance.test_triton_sync import tensor
from tests.conftest import Service

pytestmark = pytest.mark.slow


def run_with_client(service: Service, scenario: Callable[[Any], Awaitable[None]]) -> None:
    """Run a scenario with a client of a service."""

    async def main() -> None:
        async with triton.InferenceServerClient(service.address) as client:
            await scenario(client)

    asyncio.run(main())


def test_server_and_repository(service: Service) -> None:
    """The server is live and ready, reports its name, and lists, unloads and loads its models."""

    async def scenario(client: Any) -> None:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert (await client.get_server_metadata(as_json=True))["name"] == "tercet"
        index = await client.get_model_repository_index(as_json=True)
        assert [(each["name"], each["state"]) for each in index["models"]] == [(name, "READY") for name in models.names()]
        await client.load_model("fizzbuzz")
        assert await client.is_model_ready("fizzbuzz")

    run_with_client(service, scenario)


@pytest.mark.parametrize("name", models.names())
def test_model(service: Service, workspace: Path, name: str) -> None:
    """It reads metadata, configuration and statistics, and gets the outputs in the card."""
    card = read_card(workspace / "models" / name)

    async def scenario(client: Any) -> None:
        metadata = await client.get_model_metadata(name, as_json=True)
        assert metadata["inputs"][0]["name"] == card.input.name
        config = (await client.get_model_config(name, as_json=True))["config"]
        assert config["input"][0]["data_type"] == f"TYPE_{card.input.datatype}"
        before = (await client.get_inference_statistics(name)).model_stats[0].inference_count
        result = await client.infer(name, [tensor(card, card.example_rows())], request_id="7", client_timeout=30)
        expected = [example.output for example in card.examples]
        np.testing.assert_allclose(result.as_numpy(card.output.name), expected, rtol=0, atol=1e-5)
        assert result.get_response().id == "7"
        after = (await client.get_inference_statistics(name)).model_stats[0].inference_count
        assert after - before == len(card.examples)

    run_with_client(service, scenario)


@pytest.mark.parametrize("name", models.names())
def test_stream(service: Service, workspace: Path, name: str) -> None:
    """A stream is answered in order; a request that fails gets its error, and the next one is answered."""
    card = read_card(workspace / "models" / name)

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number, model in enumerate((name, "nope", name)):
            yield {"model_name": model, "inputs": [tensor(card, card.example_rows())], "request_id": str(number)}

    async def scenario(client: Any) -> None:
        results = [result async for result in client.stream_infer(requests())]
        assert [error is None for _, error in results] == [True, False, True]
        assert "there is no model 'nope'" in str(results[1][1])
        assert [result.get_response().id for result, error in results if not error] == ["0", "2"]

    run_with_client(service, scenario)


def test_errors(service: Service) -> None:
    """An unknown model or version is NOT_FOUND."""

    async def scenario(client: Any) -> None:
        for call in (client.get_model_metadata("nope"), client.get_model_config("fizzbuzz", "nope")):
            with pytest.raises(InferenceServerException) as caught:
                await call
            assert caught.value.status() == "StatusCode.NOT_FOUND"

    run_with_client(service, scenario)
