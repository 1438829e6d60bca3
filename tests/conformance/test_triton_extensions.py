"""Triton's protocol beyond inference: parameters, versions, and the extensions that are not supported."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tercet.card import Card, read_card

from tests.conformance.test_triton_sync import tensor
from tests.conftest import Service

pytestmark = pytest.mark.slow


@pytest.fixture
def client(default_service: Service) -> Iterator[Any]:
    """A client of the service."""
    with triton.InferenceServerClient(default_service.address) as opened:
        yield opened


@pytest.fixture
def card(workspace: Path) -> Card:
    """A model."""
    return read_card(workspace / "models" / "fizzbuzz")


def code_of(call: Callable[[], Any]) -> str:
    """The status code of a call that fails."""
    with pytest.raises(triton.InferenceServerException) as caught:
        call()
    return str(caught.value.status()).removeprefix("StatusCode.")


@pytest.mark.parametrize(
    "options",
    [
        {"priority": 1},
        {"timeout": 1000},
        {"sequence_id": 3, "sequence_start": True, "sequence_end": True},
        {"parameters": {"mine": "text", "flag": True, "number": 3}},
        {"headers": {"x-mine": "1"}},
        {"compression_algorithm": "gzip"},
        {"model_version": ""},
        {"model_version": "1"},
    ],
)
def test_ignored_parameters(client: Any, card: Card, options: dict[str, Any]) -> None:
    """Parameters that do not apply change nothing; the version is empty or the one that is served."""
    result = client.infer(card.name, [tensor(card, card.example_rows())], **options)
    expected = [example.output for example in card.examples]
    np.testing.assert_allclose(result.as_numpy(card.output.name), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.get_trace_settings(),
        lambda client: client.update_trace_settings(settings={}),
        lambda client: client.get_log_settings(),
        lambda client: client.update_log_settings({}),
        lambda client: client.get_system_shared_memory_status(),
        lambda client: client.register_system_shared_memory("mine", "/mine", 8),
        lambda client: client.unregister_system_shared_memory(),
        lambda client: client.get_cuda_shared_memory_status(),
        lambda client: client.register_cuda_shared_memory("mine", b"", 0, 8),
        lambda client: client.unregister_cuda_shared_memory(),
    ],
)
def test_unsupported_extensions(client: Any, call: Callable[[Any], Any]) -> None:
    """Shared memory, trace and log settings are UNIMPLEMENTED."""
    assert code_of(lambda: call(client)) == "UNIMPLEMENTED"


def test_shared_memory_in_a_request(client: Any, card: Card) -> None:
    """A tensor in shared memory is INVALID_ARGUMENT, as input and as output."""
    rows = card.example_rows()
    input_, output = (
        triton.InferInput(card.input.name, rows.shape, card.input.datatype),
        triton.InferRequestedOutput(card.output.name),
    )
    input_.set_shared_memory("mine", rows.nbytes)
    assert code_of(lambda: client.infer(card.name, [input_])) == "INVALID_ARGUMENT"
    output.set_shared_memory("mine", 8)
    assert code_of(lambda: client.infer(card.name, [tensor(card, rows)], outputs=[output])) == "INVALID_ARGUMENT"


@pytest.mark.parametrize("version", ["0", "2", "latest", "1.0"])
def test_other_versions(client: Any, card: Card, version: str) -> None:
    """Every call accepts only the version that is served."""
    calls = (
        lambda: client.infer(card.name, [tensor(card, card.example_rows())], model_version=version),
        lambda: client.is_model_ready(card.name, version),
        lambda: client.get_model_metadata(card.name, version),
        lambda: client.get_model_config(card.name, version),
        lambda: client.get_inference_statistics(card.name, version),
    )
    assert [code_of(call) for call in calls] == ["NOT_FOUND"] * len(calls)
