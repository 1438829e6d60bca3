"""Servers in this process, over nghttp2 and, to compare, over grpcio; and a client that sends frames as it likes."""

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import grpc
import hpack
import pytest
import uvloop
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, SettingsFrame
from tercet.server import transport

SERVICE = "test.Test"
OWN = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]  # a connection that no other test shares
SERVERS: dict[str, Callable[..., Any]] = {"nghttp2": transport.server, "grpcio": grpc.aio.server}
PLAIN_ASYNCIO = "TERCET_TEST_PLAIN_ASYNCIO"  # run these tests without uvloop, which the service uses where it is there
SECONDS = 30.0  # that anything may take on a busy machine


@pytest.fixture(params=["nghttp2", pytest.param("grpcio", marks=pytest.mark.slow)])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """What makes a server: ours must do as grpc.aio does."""
    return SERVERS[request.param]


def unary(method: Callable[[Any, Any], Any]) -> Any:
    """A handler of bytes for bytes."""
    return grpc.unary_unary_rpc_method_handler(method)


async def echo(request: bytes, _context: Any) -> bytes:
    """Answer with the request."""
    return request


def add(server: Any, handlers: Mapping[str, Any]) -> None:
    """Add handlers as generated code does."""
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, dict(handlers)),))
    server.add_registered_method_handlers(SERVICE, handlers)


@asynccontextmanager
async def running(
    handlers: Mapping[str, Any] | None = None,
    make: Callable[..., Any] = transport.server,
    options: Mapping[str, Any] | None = None,
    address: str = "127.0.0.1:0",
    **arguments: Any,
) -> AsyncIterator[tuple[Any, str]]:
    """A server with these methods and `Echo`, and its address."""
    server = make(options=list({"grpc.so_reuseport": 0, **(options or {})}.items()), **arguments)
    add(server, {"Echo": unary(echo), **(handlers or {})})
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield server, address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{port}"
    finally:
        await server.stop(0)


def connect(address: str, options: Sequence[Any] = (), **arguments: Any) -> Any:
    """A channel of grpc.aio, without types: its requests and responses are bytes."""
    return grpc.aio.insecure_channel(address, [*OWN, *options], **arguments)


async def eventually(condition: Callable[[], Any]) -> None:
    """Wait until it holds; the test's own timeout bounds that."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@asynccontextmanager
async def calling(handlers: Mapping[str, Any] | None = None, channel: Sequence[Any] = (), **arguments: Any) -> AsyncIterator[Any]:
    """A channel of grpc.aio to a server of its own."""
    async with running(handlers, **arguments) as (_, address), connect(address, channel) as opened:
        yield opened


def path(name: str) -> str:
    """The path of a method."""
    return f"/{SERVICE}/{name}"


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def run(main: Callable[[], Any]) -> None:
    """Run a test's coroutine."""

    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await main()

    (uvloop if PLAIN_ASYNCIO not in os.environ else asyncio).run(bounded())


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, REFUSED, CANCEL, CALM = 0, 1, 3, 6, 7, 8, 11


def message(content: bytes, *, compressed: bool = False) -> bytes:
    """With gRPC's prefix."""
    return struct.pack(">BI", compressed, len(content)) + content


class Raw:
    """A client that can misbehave: it sends frames one by one, and reads only when told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.frames: list[Frame] = []
        self.headers: dict[int, dict[str, str]] = {}  # of each stream, trailers included
        self.data: dict[int, bytearray] = {}

    @classmethod
    @asynccontextmanager
    async def connect(cls, address: str, settings: Mapping[int, int] | None = None, *, greet: bool = True) -> AsyncIterator[Self]:
        """A connection; with the preface and SETTINGS unless `greet` is false."""
        if address.startswith("unix:"):
            client = cls(*await asyncio.open_unix_connection(address.removeprefix("unix:")))
        else:
            host, port = address.rsplit(":", 1)
            client = cls(*await asyncio.open_connection(host.strip("[]"), int(port)))
        try:
            if greet:
                client.send(PREFACE, SettingsFrame(settings=dict(settings or {})))
            yield client
        finally:
            client.writer.close()

    def send(self, *frames: Frame | bytes) -> None:
        """Write frames, or bytes as they are."""
        self.writer.write(b"".join(frame if isinstance(frame, bytes) else frame.serialize() for frame in frames))

    def request(
        self, stream_id: int = 1, name: str = "Echo", content: bytes | None = b"", *, end: bool = True, **fields: str
    ) -> None:
        """Send a call: HEADERS, and DATA with one message unless `content` is None."""
        headers = {":method": "POST", ":scheme": "http", ":path": path(name), ":authority": "x", "te": "trailers"}
        headers |= {"content-type": "application/grpc"} | {
            key.replace("_", "-").replace("--", ":"): value for key, value in fields.items()
        }
        self.send_headers(stream_id, headers, end=end and content is None)
        if content is not None:
            self.send(DataFrame(stream_id, message(content), flags=["END_STREAM"] if end else []))

    def send_headers(self, stream_id: int, headers: Mapping[str, str] | Iterable[tuple[str, str]], *, end: bool = False) -> None:
        """Send HEADERS."""
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        self.send(
            HeadersFrame(stream_id, self.encoder.encode(list(pairs)), flags=["END_HEADERS", *(["END_STREAM"] if end else [])])
        )

    async def receive(self) -> Frame | None:
        """The next frame; None at the end. SETTINGS are acknowledged."""
        try:
            head = await self.reader.readexactly(9)
            frame, length = Frame.parse_frame_header(memoryview(head))
            frame.parse_body(memoryview(await self.reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self.frames.append(frame)
        if isinstance(frame, HeadersFrame):
            self.headers.setdefault(frame.stream_id, {}).update(
                {str(key): str(value) for key, value in self.decoder.decode(frame.data)}
            )
        elif isinstance(frame, DataFrame):
            self.data.setdefault(frame.stream_id, bytearray()).extend(frame.data)
        elif isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            self.send(SettingsFrame(flags=["ACK"]))
        return frame

    async def until(self, wanted: Callable[[Frame], Any]) -> Frame:
        """Read until there is such a frame."""
        while (frame := await self.receive()) is not None:
            if wanted(frame):
                return frame
        raise AssertionError(f"the connection ended after {self.frames}")

    async def answer(self, stream_id: int = 1) -> dict[str, str]:
        """Read until a stream ends; its headers and trailers."""
        await self.until(lambda frame: frame.stream_id == stream_id and "END_STREAM" in frame.flags)
        return self.headers[stream_id]

    async def rest(self) -> list[Frame]:
        """Read to the end of the connection; all frames so far."""
        while await self.receive() is not None:
            pass
        return self.frames

    async def ping(self) -> None:
        """Wait until the server has answered all that was sent before."""
        self.send(PingFrame(opaque_data=b"sync sy"[:8].ljust(8)))
        await self.until(lambda frame: isinstance(frame, PingFrame) and "ACK" in frame.flags)

    async def goaway(self) -> GoAwayFrame:
        """Read to the end; the last GOAWAY."""
        found = [frame for frame in await self.rest() if isinstance(frame, GoAwayFrame)]
        assert found, f"the connection ended without a GOAWAY, after {self.frames}"
        return found[-1]
