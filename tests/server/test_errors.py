"""The status codes of calls that wait, and of models that are not trained."""

import asyncio
import shutil
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tercet.card import read_card
from tercet.errors import shorten
from tercet.proto.digits_pb2 import Image as ImageMessage
from tercet.proto.fizzbuzz_pb2 import AnswerRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelReadyRequest, ServerReadyRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

from tests.server.support import (
    NOT_SERVING,
    PIXELS,
    SERVING,
    HeldEngine,
    Visits,
    answer,
    digits,
    infer_request,
    inside,
    unpack,
)

pytestmark = pytest.mark.slow


def test_full_queue(workspace: Path, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue refuses at once and says when to retry; the waiting requests are answered."""

    async def main() -> None:
        visits = Visits(monkeypatch)
        async with inside(workspace / "models", max_request_rows=2, max_queue_rows=2) as (_, channel):
            stub = FizzBuzzStub(channel)
            running = stub.Answer(AnswerRequest(numbers=[1]))
            await asyncio.to_thread(engine.begun.wait)
            waiting = stub.Answer(AnswerRequest(numbers=[2, 3]))
            for _ in range(2):
                await visits.came.acquire()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Answer(AnswerRequest(numbers=[4]))
            assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
            [info] = unpack(caught.value, RetryInfo)
            assert info.retry_delay.ToTimedelta().total_seconds() > 0
            engine.open.set()
            assert [list((await call).words) for call in (running, waiting)] == [["1"], ["2", "3"]]
        assert engine.executed == [1, 2, 3]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("deadline", "queue_timeout", "cancel", "code"),
    [
        (0.5, 60, False, StatusCode.DEADLINE_EXCEEDED),
        (None, 0.05, False, StatusCode.DEADLINE_EXCEEDED),
        (None, 60, True, StatusCode.CANCELLED),
    ],
    ids=["deadline", "queue_timeout", "cancelled"],
)
def test_left_while_queued(
    workspace: Path,
    engine: HeldEngine,
    monkeypatch: pytest.MonkeyPatch,
    *,
    deadline: float | None,
    queue_timeout: float,
    cancel: bool,
    code: StatusCode,
) -> None:
    """A call that ends while waiting, by its deadline, the queue timeout or its client, gets the right code and never runs."""

    async def main() -> None:
        visits = Visits(monkeypatch)
        async with inside(workspace / "models", queue_timeout=queue_timeout) as (_, channel):
            stub = FizzBuzzStub(channel)
            running = stub.Answer(AnswerRequest(numbers=[1]))
            await asyncio.to_thread(engine.begun.wait)
            call = stub.Answer(AnswerRequest(numbers=[2]), timeout=deadline)
            for _ in range(2):
                await visits.came.acquire()
            if cancel:
                call.cancel()
            assert await call.code() == code
            await visits.left.acquire()
            engine.open.set()
            assert list((await running).words) == ["1"]
        assert engine.executed == [1]

    asyncio.run(main())


def test_known_but_not_trained(workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model without a card is UNAVAILABLE and not ready, its error says what to do, and other models are served."""
    shutil.copytree(workspace / "models" / "fizzbuzz", tmp_path / "fizzbuzz")
    (tmp_path / "mnist").mkdir()
    shutil.copy(workspace / "models" / "mnist" / "contract.py", tmp_path / "mnist")
    card = read_card(workspace / "models" / "mnist")

    async def main() -> None:
        async with inside(tmp_path) as (_, channel):
            stub = GRPCInferenceServiceStub(channel)
            for call in (stub.ModelInfer(infer_request(card, card.example_rows())), digits(ImageMessage(pixels=PIXELS))(channel)):
                assert await call.code() == StatusCode.UNAVAILABLE
                assert "dvc repro" in await call.details()
            assert [(await stub.ModelReady(ModelReadyRequest(name=name))).ready for name in ("fizzbuzz", "mnist")] == [True, False]
            assert not (await stub.ServerReady(ServerReadyRequest())).ready
            health = health_pb2_grpc.HealthStub(channel)
            checks = [await health.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("fizzbuzz", "mnist")]
            assert [check.status for check in checks] == [SERVING, NOT_SERVING]
            assert (await answer(15)(channel)).words == ["fizzbuzz"]

    asyncio.run(main())
    assert "mnist is not trained" in caplog.text


@pytest.mark.parametrize("text", ["", "x" * 30, "x" * 31, "ü" * 16, "€" * 10**6, "\ud800" * 31])
def test_shorten(text: str) -> None:
    """A text that is short enough stays; of a long one the beginning and the end stay."""
    short = shorten(text, 30)
    if len(text.encode(errors="replace")) <= 30:
        assert short == text
    else:
        assert len(short.encode()) <= 30 + len(" ... ")
        assert " ... " in short
