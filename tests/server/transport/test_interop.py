"""gRPC's interoperability cases, by their official names, with grpcio's two clients, against nghttp2 and grpcio's server."""

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from tests.server.transport.conftest import OWN, failure, run
from tests.server.transport.interop import messages, payload, serve, services

REQUEST_SIZES, RESPONSE_SIZES = (27182, 8, 1828, 45904), (31415, 9, 2653, 58979)
SPECIAL = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"


class BlockingCall:
    """A streaming call of grpcio's blocking client, with the interface of grpc.aio's."""

    def __init__(self, method: Any, **options: Any) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = method(iter(self._requests.get, None), **options)

    async def write(self, request: Any) -> None:
        """Send a request."""
        self._requests.put(request)

    async def done_writing(self) -> None:
        """Send no more."""
        self._requests.put(None)

    async def read(self) -> Any:
        """The next response, or EOF."""
        try:
            response = await asyncio.to_thread(next, self._call, grpc.aio.EOF)
        except grpc.RpcError as error:
            raise as_aio(error) from error
        return response

    async def code(self) -> Any:
        """The status."""
        return await asyncio.to_thread(self._call.code)

    async def initial_metadata(self) -> Any:
        """What came first."""
        return await asyncio.to_thread(self._call.initial_metadata)

    async def trailing_metadata(self) -> Any:
        """What came last."""
        return await asyncio.to_thread(self._call.trailing_metadata)

    def cancel(self) -> None:
        """End the call."""
        self._call.cancel()
        self._requests.put(None)


def as_aio(error: Any) -> grpc.aio.AioRpcError:
    """The error of a blocking call as that of grpc.aio."""
    return grpc.aio.AioRpcError(error.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), error.details())


class Client:
    """Either client, with the interface of grpc.aio."""

    def __init__(self, stub: Any, *, blocking: bool) -> None:
        self.stub, self.blocking = stub, blocking

    async def unary(self, name: str, request: Any, stub: Any = None, **options: Any) -> Any:
        """The response."""
        method = getattr(stub or self.stub, name)
        if not self.blocking:
            return await method(request, **options)
        try:
            return await asyncio.to_thread(method, request, **options)
        except grpc.RpcError as error:
            raise as_aio(error) from error

    async def responses(self, request: Any) -> list[Any]:
        """All of a streamed answer."""
        if self.blocking:
            return await asyncio.to_thread(lambda: list(self.stub.StreamingOutputCall(request)))
        return [response async for response in self.stub.StreamingOutputCall(request)]

    async def requests(self, requests: list[Any], **options: Any) -> Any:
        """The answer to a streamed request."""
        if self.blocking:
            return await asyncio.to_thread(self.stub.StreamingInputCall, iter(requests), **options)
        return await self.stub.StreamingInputCall(iter(requests), **options)

    def duplex(self, **options: Any) -> Any:
        """A bidirectional call."""
        return BlockingCall(self.stub.FullDuplexCall, **options) if self.blocking else self.stub.FullDuplexCall(**options)


@pytest.fixture(params=["grpc.aio", "grpcio"])
def connect(request: pytest.FixtureRequest, make: Callable[..., Any]) -> Callable[[], Any]:
    """What gives a client that is connected to a server of its own."""

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Client]:
        server, port = await serve("127.0.0.1:0", make)
        address, blocking = f"127.0.0.1:{port}", request.param == "grpcio"
        channel: Any = grpc.insecure_channel(address, OWN) if blocking else grpc.aio.insecure_channel(address, OWN)
        client = Client(services.TestServiceStub(channel), blocking=blocking)
        client.other = services.UnimplementedServiceStub(channel)  # type: ignore[attr-defined]
        try:
            yield client
        finally:
            if blocking:
                await asyncio.to_thread(channel.close)
            else:
                await channel.close()
            await server.stop(0)

    return opened


def simple(**fields: Any) -> Any:
    """The request of large_unary."""
    return messages.SimpleRequest(response_size=314159, payload=payload(271828), **fields)


def output(*sizes: int, **fields: Any) -> Any:
    """A request for responses of these sizes."""
    return messages.StreamingOutputCallRequest(
        response_parameters=[messages.ResponseParameters(size=size, **fields) for size in sizes]
    )


def case(body: Callable[[Client], Any]) -> Callable[[Callable[[], Any]], None]:
    """A test of one case."""

    def test(connect: Callable[[], Any]) -> None:
        async def main() -> None:
            async with connect() as client:
                await body(client)

        run(main)

    test.__doc__ = body.__doc__
    return test


@case
async def test_empty_unary(client: Client) -> None:
    """No bytes either way."""
    assert await client.unary("EmptyCall", messages.Empty()) == messages.Empty()


@case
async def test_large_unary(client: Client) -> None:
    """More than a window either way."""
    response = await client.unary("UnaryCall", simple())
    assert response.payload.body == bytes(314159)


@case
async def test_client_compressed_unary(client: Client) -> None:
    """Requests with and without compression."""
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate, grpc.Compression.NoCompression):
        response = await client.unary(
            "UnaryCall", simple(expect_compressed=messages.BoolValue(value=True)), compression=compression
        )
        assert len(response.payload.body) == 314159


@case
async def test_server_compressed_unary(client: Client) -> None:
    """Responses with and without compression."""
    for compressed in (True, False):
        response = await client.unary("UnaryCall", simple(response_compressed=messages.BoolValue(value=compressed)))
        assert response.payload.body == bytes(314159)


@case
async def test_client_streaming(client: Client) -> None:
    """Four requests, one response."""
    requests = [messages.StreamingInputCallRequest(payload=payload(size)) for size in REQUEST_SIZES]
    assert (await client.requests(requests)).aggregated_payload_size == 74922


@case
async def test_client_compressed_streaming(client: Client) -> None:
    """The same, compressed."""
    requests = [messages.StreamingInputCallRequest(payload=payload(size)) for size in (27182, 45904)]
    assert (await client.requests(requests, compression=grpc.Compression.Gzip)).aggregated_payload_size == 73086


@case
async def test_server_streaming(client: Client) -> None:
    """One request, four responses."""
    assert [len(response.payload.body) for response in await client.responses(output(*RESPONSE_SIZES))] == list(RESPONSE_SIZES)


@case
async def test_server_compressed_streaming(client: Client) -> None:
    """One response compressed, the next not."""
    request = output(31415, compressed=messages.BoolValue(value=True))
    request.response_parameters.extend(output(92653).response_parameters)
    assert [len(response.payload.body) for response in await client.responses(request)] == [31415, 92653]


@case
async def test_ping_pong(client: Client) -> None:
    """Each request is answered before the next."""
    call = client.duplex()
    for request_size, response_size in zip(REQUEST_SIZES, RESPONSE_SIZES, strict=True):
        request = output(response_size)
        request.payload.CopyFrom(payload(request_size))
        await call.write(request)
        assert len((await call.read()).payload.body) == response_size
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is StatusCode.OK


@case
async def test_empty_stream(client: Client) -> None:
    """A bidirectional call without messages."""
    call = client.duplex()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is StatusCode.OK


@case
async def test_custom_metadata(client: Client) -> None:
    """Metadata comes back at the begin and at the end."""
    sent = (("x-grpc-test-echo-initial", "test_initial_metadata_value"), ("x-grpc-test-echo-trailing-bin", b"\xab\xab\xab"))
    call = client.duplex(metadata=sent)
    request = output(314159)
    request.payload.CopyFrom(payload(271828))
    await call.write(request)
    assert len((await call.read()).payload.body) == 314159
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert sent[0] in [tuple(entry) for entry in await call.initial_metadata()]
    assert sent[1] in [tuple(entry) for entry in await call.trailing_metadata()]


@case
async def test_status_code_and_message(client: Client) -> None:
    """The status of a unary and of a bidirectional call."""
    status = messages.EchoStatus(code=2, message="test status message")
    error = await failure(client.unary("UnaryCall", messages.SimpleRequest(response_status=status)))
    assert (error.code(), error.details()) == (StatusCode.UNKNOWN, "test status message")
    call = client.duplex()
    await call.write(messages.StreamingOutputCallRequest(response_status=status))
    await call.done_writing()
    error = await failure(call.read())
    assert (error.code(), error.details()) == (StatusCode.UNKNOWN, "test status message")


@case
async def test_special_status_message(client: Client) -> None:
    """Whitespace and characters outside ASCII in a status."""
    status = messages.EchoStatus(code=2, message=SPECIAL)
    error = await failure(client.unary("UnaryCall", messages.SimpleRequest(response_status=status)))
    assert (error.code(), error.details()) == (StatusCode.UNKNOWN, SPECIAL)


@case
async def test_unimplemented_method(client: Client) -> None:
    """A method that the servicer leaves to its base class."""
    assert (await failure(client.unary("UnimplementedCall", messages.Empty()))).code() is StatusCode.UNIMPLEMENTED


@case
async def test_unimplemented_service(client: Client) -> None:
    """A service that was not added."""
    error = await failure(client.unary("UnimplementedCall", messages.Empty(), stub=client.other))  # type: ignore[attr-defined]
    assert error.code() is StatusCode.UNIMPLEMENTED


@case
async def test_cancel_after_begin(client: Client) -> None:
    """A call is cancelled before it has sent anything."""
    call = client.duplex()
    call.cancel()
    assert await call.code() is StatusCode.CANCELLED


@case
async def test_cancel_after_first_response(client: Client) -> None:
    """A call is cancelled after its first response."""
    call = client.duplex()
    await call.write(output(31415))
    assert len((await call.read()).payload.body) == 31415
    call.cancel()
    assert await call.code() is StatusCode.CANCELLED


@case
async def test_timeout_on_sleeping_server(client: Client) -> None:
    """The deadline ends a call that the server does not answer."""
    call = client.duplex(timeout=0.001)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(output(31415, interval_us=1_000_000))
        await call.read()
    assert await call.code() is StatusCode.DEADLINE_EXCEEDED
