"""The life of a call: accepted, refused, drained; unexpected errors are opaque."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import AsyncMock, Mock

import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.server.rpc import Calls, MalformedRequest, parse_or_malformed, streaming_rpc, unary_rpc
from tercet.server.servicers import Backend, BaseServicer

from tests.server.support import NOT_SERVING, SERVING, HeldEngine, inside


@pytest.mark.slow
def test_drain(workspace: Path, engine: HeldEngine) -> None:
    """A server that stops reports NOT_SERVING first, finishes the calls it has accepted, and then accepts no more."""

    async def main() -> None:
        async with inside(workspace / "models") as (server, channel):
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="fizzbuzz"))
            assert (await watch.read()).status == SERVING
            running = FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[1]))
            await asyncio.to_thread(engine.begun.wait)
            stopping = asyncio.create_task(server.stop())
            assert (await watch.read()).status == NOT_SERVING
            watch.cancel()
            assert not stopping.done()
            engine.open.set()
            assert list((await running).words) == ["1"]
            await stopping
            assert await FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[2])).code() == StatusCode.UNAVAILABLE

    asyncio.run(main())


@pytest.mark.slow
def test_late_calls(workspace: Path, engine: HeldEngine) -> None:
    """While a server drains, new calls of any kind are refused at once, and accepted calls are answered."""

    async def main() -> None:
        async with inside(workspace / "models") as (server, channel):
            stub = FizzBuzzStub(channel)
            running = stub.Answer(AnswerRequest(numbers=[1]))
            await asyncio.to_thread(engine.begun.wait)
            server.calls.draining = True
            for call in (stub.Answer(AnswerRequest(numbers=[2])), stub.Count(CountRequest(start=2, stop=3))):
                assert await call.code() == StatusCode.UNAVAILABLE
                assert "retry with another instance" in await call.details()
            engine.open.set()
            assert list((await running).words) == ["1"]
        assert engine.executed == [1]

    asyncio.run(main())


class Echo(BaseServicer):
    """Returns its requests."""

    @unary_rpc
    async def Unary(self, request: Any, _context: Any) -> Any:  # noqa: N802
        return request

    @streaming_rpc
    async def Stream(self, request: Any, _context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield request


def call(request: Any, *, stream: bool, remaining: float | None = None, draining: bool = False) -> tuple[Any, Backend]:
    """Call Echo. Returns the response or the status code, and the backend."""
    backend = Backend(repository=Mock(), telemetry=Mock(), calls=Calls(), command=Mock())
    backend.calls.draining = draining
    context = Mock(time_remaining=lambda: remaining, abort=AsyncMock(side_effect=lambda code, *_, **__: abort(code)))

    async def main() -> Any:
        if stream:
            return await anext(aiter(Echo(backend).Stream(request, context)))
        return await Echo(backend).Unary(request, context)

    try:
        return asyncio.run(main()), backend
    except AbortedError as aborted:
        return aborted.args[0], backend


class AbortedError(Exception):
    """What gRPC raises when a call is aborted."""


def abort(code: StatusCode) -> NoReturn:
    """End a call as gRPC does."""
    raise AbortedError(code)


both = pytest.mark.parametrize("stream", [False, True])


@both
@pytest.mark.parametrize("remaining", [None, 0.5])
def test_calls_are_counted(*, stream: bool, remaining: float | None) -> None:
    """A call is counted and answered; a unary one is recorded with its time."""
    response, backend = call("request", stream=stream, remaining=remaining)
    assert (response, backend.calls.received) == ("request", 1)
    assert backend.telemetry.call_answered.called is not stream  # type: ignore[attr-defined]  # a Mock


@both
@pytest.mark.parametrize(
    ("request_", "remaining", "draining", "code"),
    [
        ("request", 0.0, False, StatusCode.DEADLINE_EXCEEDED),  # gRPC has not cancelled it yet
        ("request", None, True, StatusCode.UNAVAILABLE),
        (MalformedRequest("reason"), None, False, StatusCode.INVALID_ARGUMENT),
    ],
)
def test_calls_that_are_not_started(
    request_: Any, remaining: float | None, code: StatusCode, *, stream: bool, draining: bool
) -> None:
    """A call after its deadline, while draining or of bytes that are not a message is counted, ended and recorded as failed."""
    response, backend = call(request_, stream=stream, remaining=remaining, draining=draining)
    assert (response, backend.calls.received) == (code, 1)
    backend.telemetry.call_failed.assert_called_once_with("Stream" if stream else "Unary", code.name)  # type: ignore[attr-defined]  # a Mock


def test_parser() -> None:
    """A parser's message is returned as it is; bytes that it cannot parse become a MalformedRequest."""
    parse = parse_or_malformed(AnswerRequest.FromString)
    assert parse(AnswerRequest(numbers=[3]).SerializeToString()) == AnswerRequest(numbers=[3])
    malformed = parse(b"\xff")
    assert isinstance(malformed, MalformedRequest)
    assert "Error parsing message" in malformed.reason


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["engine", "tercet.server.servicers.fizzbuzz.to_words"])
@pytest.mark.parametrize("stream", [False, True])
def test_internal_errors_are_opaque(
    workspace: Path,
    engine: HeldEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    broken: str,
    stream: bool,
) -> None:
    """An unexpected error gives the client a fixed text and an id; the log has the cause under that id."""

    def fail(*_: Any) -> NoReturn:
        raise OSError("/secret/path")

    async def main() -> None:
        engine.open.set()
        async with inside(workspace / "models") as (_, channel):
            stub = FizzBuzzStub(channel)
            with monkeypatch.context() as patch:
                patch.setattr(engine, "fails", True) if broken == "engine" else patch.setattr(broken, fail)
                call = stub.Count(CountRequest(start=1, stop=2)) if stream else stub.Answer(AnswerRequest(numbers=[1]))
                assert await call.code() == StatusCode.INTERNAL
                details = await call.details()
            assert list((await stub.Answer(AnswerRequest(numbers=[1]))).words) == ["1"]
        [error] = [record for record in caplog.records if record.levelname == "ERROR"]
        match = re.fullmatch(r"(internal error [0-9a-f]{12}); the service's log has the cause under this id", details)
        assert match
        assert match[1] == error.getMessage()
        assert "/secret/path" in caplog.text

    asyncio.run(main())
