"""The Open Inference Protocol: batches, and ModelStreamInfer."""

import asyncio
import itertools
import queue
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tercet.card import Card, Rows, read_card
from tercet.client import Client
from tercet.proto.inference_pb2 import ModelInferRequest, ModelInferResponse
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server.servicers.inference import STREAM_WINDOW, InferenceServicer

import models
from benchmarks.load import build_request
from tests.conftest import Service
from tests.server.support import HeldEngine, answers, inside

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
def test_every_model_answers_batches(service: Service, cards: dict[str, Card], name: str, batch: int) -> None:
    """Every model returns the outputs in its card, at any batch size, with either engine."""
    card = cards[name]
    rows = np.resize(card.example_rows(), (batch, *card.input.shape))
    expected = np.resize(answers(card), (batch, *card.output.shape))
    with Client(service.address) as client:
        np.testing.assert_allclose(client.infer(name, rows), expected, rtol=0, atol=1e-5)


@pytest.fixture
def stub(default_service: Service) -> Iterator[Any]:
    """A stub of the service."""
    with grpc.insecure_channel(default_service.address) as channel:
        yield GRPCInferenceServiceStub(channel)


def numbered(card: Card, rows: int, number: int) -> ModelInferRequest:
    """A request with an id."""
    request = build_request(card, rows)
    request.id = f"id {number}"
    return request


def numbers(response: ModelInferResponse) -> Rows:
    """The output of a response, flattened."""
    return np.frombuffer(response.raw_output_contents[0], "<f4")


def test_answers_come_in_order(stub: Any, cards: dict[str, Card]) -> None:
    """More requests than the window, for all models and of many sizes, get the results of ModelInfer, in order."""
    turns = itertools.cycle(cards.values())
    requests = [numbered(next(turns), 1 + i * 7 % 50, i) for i in range(3 * STREAM_WINDOW)]
    responses = list(stub.ModelStreamInfer(iter(requests)))
    assert [response.infer_response.id for response in responses] == [request.id for request in requests]
    for request, response in zip(requests, responses, strict=True):
        assert response.error_message == ""
        streamed, alone = response.infer_response, stub.ModelInfer(request)
        np.testing.assert_allclose(numbers(streamed), numbers(alone), rtol=0, atol=1e-6)
        for answer in (streamed, alone):
            answer.ClearField("raw_output_contents")
        assert streamed == alone


def test_errors_stay_in_band(stub: Any, cards: dict[str, Card]) -> None:
    """The error of a request comes in band under its id, with the text of ModelInfer, and the stream continues."""
    requests = [numbered(cards["mnist"], 2, i) for i in range(6)]
    requests[1].model_name = "nope"
    requests[2].inputs[0].shape[0] = 3
    requests[4].model_version = "nope"
    responses = list(stub.ModelStreamInfer(iter(requests)))
    assert [response.infer_response.id for response in responses] == [request.id for request in requests]
    for request, response in zip(requests, responses, strict=True):
        _, alone = stub.ModelInfer.with_call(request) if not response.error_message else (None, stub.ModelInfer.future(request))
        assert response.error_message == alone.details()
    assert [bool(response.error_message) for response in responses] == [False, True, True, False, True, False]


def test_tritonclient(default_service: Service, cards: dict[str, Card]) -> None:
    """NVIDIA's client gets results with their ids, an error for the broken request, and the results after it."""
    card, got = cards["mnist"], queue.Queue[tuple[Any, Any]]()
    tensor = triton.InferInput(card.input.name, [2, *card.input.shape], card.input.datatype)
    tensor.set_data_from_numpy(np.resize(card.example_rows(), (2, *card.input.shape)))
    with triton.InferenceServerClient(default_service.address) as client:
        expected = client.infer(card.name, [tensor]).as_numpy(card.output.name)
        client.start_stream(callback=lambda result, error: got.put((result, error)))
        names = [card.name, "nope", *[card.name] * STREAM_WINDOW]
        for i, name in enumerate(names):
            client.async_stream_infer(name, [tensor], request_id=f"id {i}")
        client.stop_stream()
    results = [got.get_nowait() for _ in names]
    assert got.empty()
    assert "there is no model 'nope'" in str(results.pop(1)[1])
    assert [result.get_response().id for result, _ in results] == [f"id {i}" for i in range(len(names)) if i != 1]
    for result, error in results:
        assert error is None
        np.testing.assert_allclose(result.as_numpy(card.output.name), expected, rtol=0, atol=1e-6)


@pytest.fixture
def engine(engine: HeldEngine) -> HeldEngine:
    """The engine of every model of a server in this process; one row per batch, in the thread."""
    engine.max_batch_rows = 1
    return engine


@pytest.fixture
def request_(workspace: Path) -> ModelInferRequest:
    """A request of one row."""
    return build_request(read_card(workspace / "models" / "fizzbuzz"), 1)


@pytest.fixture(autouse=True)
def nothing_logged(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test except that of unexpected errors leaves a warning in our log, or a lost exception in asyncio's."""
    yield
    records = [record for record in caplog.get_records("call") if record.name.startswith(("tercet", "asyncio"))]
    if request.function is not test_unexpected_errors_are_opaque:
        assert [record.getMessage() for record in records if record.levelname in ("WARNING", "ERROR")] == []


def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Semaphore, asyncio.Semaphore, Callable[[], int]]:
    """Semaphores for requests that reach and leave the servicer, and the maximum at any one time."""
    came, left, infer = asyncio.Semaphore(0), asyncio.Semaphore(0), InferenceServicer.ModelInfer
    present, most = 0, 0

    async def watched(servicer: InferenceServicer, request: ModelInferRequest, context: Any) -> ModelInferResponse:
        nonlocal present, most
        present += 1
        most = max(most, present)
        came.release()
        try:
            return await infer(servicer, request, context)
        finally:
            present -= 1
            left.release()

    monkeypatch.setattr(InferenceServicer, "ModelInfer", watched)
    return came, left, lambda: most


def test_window(workspace: Path, engine: HeldEngine, request_: ModelInferRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """About STREAM_WINDOW requests of a stream are in work at a time, no matter how many the client sends."""

    async def main() -> None:
        came, _, most = watch(monkeypatch)
        async with inside(workspace / "models") as (_, channel):
            stub = GRPCInferenceServiceStub(channel)
            call = stub.ModelStreamInfer(iter([request_] * (3 * STREAM_WINDOW)))
            for _ in range(STREAM_WINDOW):
                await came.acquire()
            engine.open.set()
            assert len([response async for response in call]) == 3 * STREAM_WINDOW
        assert STREAM_WINDOW <= most() <= STREAM_WINDOW + 2  # one is answered, one waits for its place

    asyncio.run(main())


def test_cancelled_stream(
    workspace: Path, engine: HeldEngine, request_: ModelInferRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting requests of a cancelled stream never run, and the next stream and call are answered."""

    async def main() -> None:
        came, left, _ = watch(monkeypatch)
        async with inside(workspace / "models") as (_, channel):
            stub = GRPCInferenceServiceStub(channel)
            call = stub.ModelStreamInfer()
            for _ in range(20):
                await call.write(request_)
                await came.acquire()
            await asyncio.to_thread(engine.begun.wait)
            call.cancel()
            for _ in range(20):
                await left.acquire()
            engine.open.set()
            assert len([response async for response in stub.ModelStreamInfer(iter([request_] * 3))]) == 3
            await stub.ModelInfer(request_)
        assert len(engine.executed) == 1 + 3 + 1

    asyncio.run(main())


def test_cancelled_by_a_client_that_does_not_read(
    workspace: Path, engine: HeldEngine, request_: ModelInferRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that cancels without having read its responses leaves nothing behind."""

    async def main() -> None:
        engine.open.set()
        came, left, _ = watch(monkeypatch)
        large = ModelInferRequest(id="x" * 100_000)
        large.MergeFrom(request_)
        async with inside(workspace / "models") as (_, channel):
            stub = GRPCInferenceServiceStub(channel)
            call = stub.ModelStreamInfer(iter([large] * (3 * STREAM_WINDOW)))
            for _ in range(STREAM_WINDOW):
                await came.acquire()
                await left.acquire()
            call.cancel()
            await stub.ModelInfer(request_)

    asyncio.run(main())


def test_unexpected_errors_are_opaque(
    workspace: Path,
    engine: HeldEngine,
    request_: ModelInferRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An unexpected error gives a fixed text and an id in band; the log has the cause, and the stream continues."""

    def fail(*_: Any) -> NoReturn:
        raise OSError("/secret/path")

    async def main() -> None:
        engine.open.set()
        async with inside(workspace / "models") as (_, channel):
            stub = GRPCInferenceServiceStub(channel)
            call = stub.ModelStreamInfer()
            with monkeypatch.context() as patch:
                patch.setattr("tercet.server.servicers.inference.decode_request", fail)
                await call.write(request_)
                broken = (await call.read()).error_message
            await call.write(request_)
            assert (await call.read()).error_message == ""
            await call.done_writing()
            assert await call.code() == grpc.StatusCode.OK
        [error] = [record for record in caplog.records if record.levelname == "ERROR"]
        match = re.fullmatch(r"(internal error [0-9a-f]{12}); the service's log has the cause under this id", broken)
        assert match
        assert match[1] == error.getMessage()
        assert "/secret/path" in caplog.text

    asyncio.run(main())
