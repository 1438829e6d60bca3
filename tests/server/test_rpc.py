"""The life of a call: accepted, refused, drained; unexpected errors are opaque."""

import asyncio
import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import AsyncMock, Mock

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.server.rpc import RpcServer

from tests.conftest import Service
from tests.server.support import NOT_SERVING, SERVING, HeldEngine, fields, inside, refused, unpack


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
            server.rpc.draining = True
            for call in (stub.Answer(AnswerRequest(numbers=[2])), stub.Count(CountRequest(start=2, stop=3))):
                assert await call.code() == StatusCode.UNAVAILABLE
                assert "retry with another instance" in await call.details()
            engine.open.set()
            assert list((await running).words) == ["1"]
        assert engine.executed == [1]

    asyncio.run(main())


async def unary(request: Any, _context: Any) -> Any:
    """Return the request."""
    return request


async def stream(request: Any, _context: Any) -> AsyncIterator[Any]:
    """Yield the request."""
    yield request


def call(method: Any, content: bytes, *, remaining: float | None = None, draining: bool = False) -> tuple[Any, int, Any]:
    """Call `unary` or `stream`. Returns the response or the status code, the number of calls received, and the telemetry."""
    server, telemetry = Mock(), Mock()
    rpc = RpcServer(server, telemetry)
    rpc.draining = draining
    make_handler: Any = grpc.unary_stream_rpc_method_handler if method is stream else grpc.unary_unary_rpc_method_handler
    handler = make_handler(method, request_deserializer=AnswerRequest.FromString)
    rpc.add_registered_method_handlers("service", {"Method": handler})
    [(_, handlers)] = [each.args for each in server.add_registered_method_handlers.call_args_list]
    context = Mock(time_remaining=lambda: remaining, abort=AsyncMock(side_effect=lambda code, *_, **__: abort(code)))

    async def main() -> Any:
        if method is stream:
            return await anext(aiter(handlers["Method"].unary_stream(content, context)))
        return await handlers["Method"].unary_unary(content, context)

    try:
        return asyncio.run(main()), rpc.received, telemetry
    except AbortedError as aborted:
        return aborted.args[0], rpc.received, telemetry


class AbortedError(Exception):
    """What gRPC raises when a call is aborted."""


def abort(code: StatusCode) -> NoReturn:
    """End a call as gRPC does."""
    raise AbortedError(code)


REQUEST = AnswerRequest(numbers=[3])
both = pytest.mark.parametrize("method", [unary, stream])


@both
@pytest.mark.parametrize("remaining", [None, 0.5])
def test_calls_are_counted(method: Any, remaining: float | None) -> None:
    """A call is counted and its request parsed and answered; a unary one is recorded with its time."""
    response, received, telemetry = call(method, REQUEST.SerializeToString(), remaining=remaining)
    assert (response, received) == (REQUEST, 1)
    assert telemetry.call_answered.called is (method is unary)


@both
@pytest.mark.parametrize(
    ("content", "remaining", "draining", "code"),
    [
        (b"", 0.0, False, StatusCode.DEADLINE_EXCEEDED),  # gRPC has not cancelled it yet
        (b"", None, True, StatusCode.UNAVAILABLE),
        (b"\xff", None, False, StatusCode.INVALID_ARGUMENT),
    ],
)
def test_calls_that_are_not_started(
    method: Any, content: bytes, remaining: float | None, code: StatusCode, *, draining: bool
) -> None:
    """A call after its deadline, while draining or of bytes that are not a message is counted, ended and recorded as failed."""
    response, received, telemetry = call(method, content, remaining=remaining, draining=draining)
    assert (response, received) == (code, 1)
    telemetry.call_failed.assert_called_once_with("Method", code.name)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["engine", "tercet.server.servicers.fizzbuzz.answer_numbers"])
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


def raw(channel: grpc.Channel, method: str, content: bytes) -> Any:
    """Send bytes as a request; return the response's bytes."""
    return channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)(content, timeout=60)


ANSWER, INFER = "/tercet.v1.FizzBuzz/Answer", "/inference.GRPCInferenceService/ModelInfer"
METHODS = [
    ANSWER,
    INFER,
    "/tercet.v1.Digits/Classify",
    "/tercet.v1.Diabetes/Assess",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/RepositoryIndex",
    "/grpc.health.v1.Health/Check",
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_not_a_message(default_service: Service, method: str) -> None:
    """A request that cannot be parsed is INVALID_ARGUMENT, like any other wrong request."""
    with grpc.insecure_channel(default_service.address) as channel:
        error = refused(partial(raw, channel, method, b"\xff"))
    assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, ["request"])
    assert "Error parsing message" in error.details()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["/tercet.v1.FizzBuzz/Count", "/inference.GRPCInferenceService/ModelStreamInfer"])
def test_bytes_that_are_not_a_message_in_a_stream(default_service: Service, method: str) -> None:
    """So it is for a streaming method; in a stream of requests the error is in band, and the stream goes on."""
    with grpc.insecure_channel(default_service.address) as channel:
        if method.endswith("Count"):
            call = channel.unary_stream(method, request_serializer=bytes, response_deserializer=bytes)(b"\xff", timeout=60)
            assert refused(lambda: next(call)).code() == StatusCode.INVALID_ARGUMENT
        else:
            responses = list(
                channel.stream_stream(method, request_serializer=bytes, response_deserializer=bytes)(iter([b"\xff"] * 2))
            )
            assert len(responses) == 2
            assert all(b"request: Error parsing" in content for content in responses)


def varint(number: int) -> bytes:
    """A number as protobuf encodes it."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def encode_field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


MUCH = 2**21  # entries that take two bytes or one each
FIZZBUZZ, NUMBER = encode_field(1, b"fizzbuzz"), encode_field(1, b"number") + encode_field(2, b"INT64")
LONG = {
    "numbers": (ANSWER, encode_field(1, b"\x01" * MUCH), "numbers"),
    "patients": ("/tercet.v1.Diabetes/Assess", b"\x0a\x00" * MUCH, "patients"),
    "images": ("/tercet.v1.Digits/Classify", b"\x0a\x00" * MUCH, "images"),
    "model": (INFER, encode_field(1, b"m" * MUCH), ""),
    "version": (INFER, FIZZBUZZ + encode_field(2, b"v" * MUCH), ""),
    "tensors": (INFER, FIZZBUZZ + b"\x2a\x00" * MUCH, "inputs"),
    "tensor": (INFER, FIZZBUZZ + encode_field(5, encode_field(1, "ü".encode() * MUCH)), "inputs"),
    "datatype": (
        INFER,
        FIZZBUZZ + encode_field(5, encode_field(1, b"number") + encode_field(2, b"\x01" * MUCH)),
        "inputs[0].datatype",
    ),
    "shape": (INFER, FIZZBUZZ + encode_field(5, NUMBER + encode_field(3, b"\x01" * MUCH)), "inputs[0].shape"),
    "values": (
        INFER,
        FIZZBUZZ + encode_field(5, NUMBER + encode_field(3, b"\x01") + encode_field(5, encode_field(3, b"\x01" * MUCH))),
        "int64_contents",
    ),
    "outputs": (INFER, FIZZBUZZ + encode_field(5, NUMBER) + b"\x32\x00" * MUCH, "inputs[0].shape"),
    "unload": ("/inference.GRPCInferenceService/RepositoryModelUnload", encode_field(2, b"m" * MUCH), ""),
    "load": ("/inference.GRPCInferenceService/RepositoryModelLoad", encode_field(2, b"m" * MUCH), ""),
    "nothing to load": ("/inference.GRPCInferenceService/RepositoryModelLoad", b"", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_long_requests_get_short_answers(default_service: Service, case: str) -> None:
    """However long the wrong part of a request, the client gets the right code and a text that fits into its metadata."""
    method, content, field = LONG[case]
    with grpc.insecure_channel(default_service.address, [("grpc.max_metadata_size", 8192)]) as channel:
        error = refused(partial(raw, channel, method, content))
    assert error.code() == (StatusCode.INVALID_ARGUMENT if field else StatusCode.NOT_FOUND)
    assert all(field in found for found in fields(error))
    assert len(unpack(error, BadRequest)) == bool(field)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["numbers", "patients", "images"])
def test_rows_are_counted_before_they_are_decoded(workspace: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Too many rows are refused before any is decoded, which would take minutes and gigabytes."""
    decode = Mock()
    for name in ("diabetes.decode_patient", "digits.decode_request", "fizzbuzz.answer_numbers"):
        monkeypatch.setattr(f"tercet.server.servicers.{name}", decode)

    async def main() -> None:
        async with inside(workspace / "models") as (_, channel):
            method, content, _ = LONG[case]
            with pytest.raises(grpc.aio.AioRpcError, match="expected 1 to"):
                await raw(channel, method, content)
        decode.assert_not_called()

    asyncio.run(main())
