"""Connections: HTTP/2 frame by frame, flow control, limits, keepalive, abuse, and the end."""

import asyncio
import contextlib
import gzip
import time
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.server.transport.conftest import (
    CALM,
    CANCEL,
    PREFACE,
    PROTOCOL_ERROR,
    Raw,
    calling,
    connect,
    eventually,
    failure,
    message,
    path,
    run,
    running,
    unary,
)

WINDOW = 4  # SETTINGS_INITIAL_WINDOW_SIZE


async def forever(_request: bytes, _context: Any) -> bytes:
    """Never answer."""
    await asyncio.sleep(3600)
    return b""


# Requests as they are written.


def test_a_call_in_frames() -> None:
    """Headers, messages and trailers are those of the gRPC standard."""

    async def main() -> None:
        async with running() as (_, address), Raw.connect(address) as client:
            client.request(content=b"abc")
            headers = await client.answer()
            assert (headers[":status"], headers["content-type"], headers["grpc-status"]) == ("200", "application/grpc", "0")
            assert client.data[1] == message(b"abc")
            client.request(3, name="None")
            assert (await client.answer(3))["grpc-status"] == str(StatusCode.UNIMPLEMENTED.value[0])
            assert 3 not in client.data  # "Trailers-Only"

    run(main)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content_type": "application/json"}, {":status": "415"}),
        ({"content_type": "application/grpc-web"}, {":status": "415"}),
        ({"content_type": "application/grpc+proto"}, {"grpc-status": "0"}),
        ({"content_type": "application/grpc;charset=utf-8"}, {"grpc-status": "0"}),
        ({"__method": "GET"}, {":status": "405"}),
        ({"grpc_timeout": "10"}, {"grpc-status": "3"}),
        ({"grpc_timeout": "123456789S"}, {"grpc-status": "3"}),
        ({"grpc_timeout": "0n"}, {"grpc-status": "4"}),
        ({"grpc_timeout": "99999999H"}, {"grpc-status": "0"}),
        ({"grpc_encoding": "br"}, {"grpc-status": "12", "grpc-accept-encoding": "identity,deflate,gzip"}),
        ({"grpc_encoding": "identity"}, {"grpc-status": "0"}),
    ],
)
def test_headers_of_a_request(fields: dict[str, Any], expected: dict[str, str]) -> None:
    """What is not gRPC gets an HTTP status; what gRPC does not allow, a status with a sentence; what is unusual works."""

    async def main() -> None:
        async with running() as (_, address), Raw.connect(address) as client:
            client.request(**fields)
            headers = await client.answer()
            assert expected.items() <= headers.items()
            client.request(3)
            assert (await client.answer(3))["grpc-status"] == "0"

    run(main)


@pytest.mark.parametrize(
    ("content", "encoding", "code"),
    [
        (b"", "identity", StatusCode.UNIMPLEMENTED),
        (message(b"a") + message(b"b"), "identity", StatusCode.UNIMPLEMENTED),
        (message(b"abc")[:-1], "identity", StatusCode.INVALID_ARGUMENT),
        (message(b"abc", compressed=True), "gzip", StatusCode.INVALID_ARGUMENT),
        (message(gzip.compress(b"abc")[:-3], compressed=True), "gzip", StatusCode.INVALID_ARGUMENT),
        (message(b"abc", compressed=True), "identity", StatusCode.INTERNAL),  # as "Compression" demands
        (message(gzip.compress(bytes(10**7)), compressed=True), "gzip", StatusCode.RESOURCE_EXHAUSTED),
        (message(gzip.compress(b"abc"), compressed=True), "gzip", StatusCode.OK),
    ],
    ids=["none", "two", "half", "not gzip", "half gzip", "no encoding", "bomb", "gzip"],
)
def test_messages_of_a_unary_request(content: bytes, encoding: str, code: StatusCode) -> None:
    """A unary request is exactly one message, whole and readable; anything else ends with a status that says so."""

    async def main() -> None:
        async with running() as (_, address), Raw.connect(address) as client:
            client.request(content=None, end=False, grpc_encoding=encoding)
            for start in range(0, len(content), 16_384):
                client.send(DataFrame(1, content[start : start + 16_384]))
            client.send(DataFrame(1, flags=["END_STREAM"]))
            headers = await client.answer()
            assert headers["grpc-status"] == str(code.value[0])
            assert code is StatusCode.OK or headers["grpc-message"]

    run(main)


def test_messages_in_pieces() -> None:
    """A message may come byte by byte, padded, and with an empty frame or trailers at the end."""

    async def main() -> None:
        async with running() as (_, address), Raw.connect(address) as client:
            client.request(1, content=None, end=False)
            for byte in message(b"abc"):
                client.send(DataFrame(1, bytes([byte]), flags=["PADDED"], pad_length=3))
                await asyncio.sleep(0)
            client.send_headers(1, [("x", "y")], end=True)
            assert (await client.answer())["grpc-status"] == "0"
            assert client.data[1] == message(b"abc")

    run(main)


def test_binary_metadata() -> None:
    """Values of -bin keys come with or without padding, or several joined with commas; what is not base64 gets a sentence."""
    seen: list[Any] = []

    async def method(request: bytes, context: Any) -> bytes:
        seen.extend(value for key, value in context.invocation_metadata() if key == "x-bin")
        return request

    async def main() -> None:
        async with running({"M": unary(method)}) as (_, address), Raw.connect(address) as client:
            for stream_id, value in ((1, "AA"), (3, "AA=="), (5, "AAE,Ag==, AwQF"), (7, "")):
                client.request(stream_id, name="M", x_bin=value)
                assert (await client.answer(stream_id))["grpc-status"] == "0"
            client.request(9, name="M", x_bin="A?")
            assert (await client.answer(9))["grpc-message"].startswith("metadata x-bin: expected base64")

    run(main)
    assert seen == [b"\0", b"\0", b"\0\1", b"\2", b"\3\4\5", b""]


@pytest.mark.parametrize(
    "bad", [("UPPER", "x"), ("a b", "x"), ("k", "new\nline"), ("k", " x"), ("k", "é"), ("grpc-status", "0"), (":status", "200")]
)
def test_metadata_that_cannot_be_sent(bad: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """Metadata of a handler that HTTP/2 does not allow is an error of the handler, not of the connection."""

    async def method(_request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata([bad])
        return b""

    async def main() -> None:
        async with calling({"M": unary(method)}) as channel:
            error = await failure(channel.unary_unary(path("M"))(b""))
            assert error.code() is StatusCode.UNKNOWN
            assert "metadata: expected" in (error.details() or "")

    run(main)
    assert "ValueError" in caplog.text


def test_abort_with_ok_is_an_error() -> None:
    """`abort` needs an error."""

    async def method(_request: bytes, context: Any) -> bytes:
        with pytest.raises(AssertionError):
            await context.abort(StatusCode.OK, "no")
        return b""

    async def main() -> None:
        async with calling({"M": unary(method)}) as channel:
            assert await channel.unary_unary(path("M"))(b"") == b""

    run(main)


@pytest.mark.parametrize("accepted", ["identity,deflate,gzip", "gzip", "identity", ""])
def test_the_client_says_which_compression_it_takes(accepted: str) -> None:
    """An answer is compressed only for clients that accept that, and only where it gets smaller."""

    async def main() -> None:
        async with running(compression=grpc.Compression.Gzip) as (_, address), Raw.connect(address) as client:
            client.request(1, content=bytes(1000), grpc_accept_encoding=accepted)
            headers = await client.answer()
            assert (headers.get("grpc-encoding") == "gzip") == ("gzip" in accepted)
            flag, rest = client.data[1][0], client.data[1][5:]
            assert (gzip.decompress(rest) if flag else rest) == bytes(1000)
            assert flag == ("gzip" in accepted)
            client.request(3, content=b"x", grpc_accept_encoding="gzip")
            await client.answer(3)
            assert client.data[3] == message(b"x")

    run(main)


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /x HTTP/1.0\r\n\r\n"])
def test_http1(text: bytes) -> None:
    """A client that speaks HTTP/1 gets an answer that it can read, and the connection is closed."""

    async def main() -> None:
        async with running() as (_, address), Raw.connect(address, greet=False) as client:
            client.send(text)
            answer = await client.reader.read()
            assert answer.startswith(b"HTTP/1.1 505 ")
            assert b"gRPC" in answer

    run(main)


def test_junk() -> None:
    """What is neither HTTP/2 nor HTTP/1 is told so and let go, and the server goes on."""

    async def main() -> None:
        async with running() as (_, address):
            async with Raw.connect(address, greet=False) as client:
                client.send(b"\x16\x03\x01\x02\x00 this is no preface")
                assert (await client.goaway()).error_code == PROTOCOL_ERROR
            async with Raw.connect(address) as client:
                client.request()
                assert (await client.answer())["grpc-status"] == "0"

    run(main)


# Flow control.


def test_a_slow_reader_stalls_its_handler() -> None:
    """A handler that writes to a client that does not read waits, and goes on when the client reads; others are not held up."""
    written: list[int] = []

    async def pour(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        for number in range(100):
            written.append(number)
            yield bytes(50_000)

    async def main() -> None:
        async with running({"Pour": grpc.unary_stream_rpc_method_handler(pour)}) as (_, address), Raw.connect(address) as client:
            client.request(1, name="Pour")
            client.send(WindowUpdateFrame(0, window_increment=2**24))  # the connection's window is wide, the stream's is 64 KiB
            await asyncio.sleep(0.2)
            assert len(written) < 10
            client.request(3, content=b"x")
            assert (await client.answer(3))["grpc-status"] == "0"
            assert len(written) < 10
            client.send(WindowUpdateFrame(1, window_increment=2**24))
            assert (await client.answer(1))["grpc-status"] == "0"
            assert len(client.data[1]) == 100 * 50_005

    run(main)


def test_a_socket_that_is_not_read_stalls_handlers() -> None:
    """With windows wide open, what the socket does not take is not produced either."""
    written: list[int] = []

    async def pour(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        for number in range(300):
            written.append(number)
            yield bytes(100_000)

    async def main() -> None:
        async with (
            running({"Pour": grpc.unary_stream_rpc_method_handler(pour)}) as (_, address),
            Raw.connect(address, {WINDOW: 2**31 - 1}) as client,
        ):
            client.send(WindowUpdateFrame(0, window_increment=2**30))
            client.request(1, name="Pour")
            count = -1
            while len(written) > count:
                count = len(written)
                await asyncio.sleep(0.2)
            assert count < 200
            assert (await client.answer(1))["grpc-status"] == "0"
            assert len(written) == 300

    run(main)


def test_a_handler_that_does_not_read_stalls_its_client() -> None:
    """Without `read` a client may send no more than a window; with it, everything arrives."""
    go = asyncio.Event()

    async def lazy(requests: AsyncIterator[bytes], _context: Any) -> bytes:
        await go.wait()
        return b"%d" % sum([len(request) async for request in requests])

    sent = [0]

    async def main() -> None:
        async with calling({"Lazy": grpc.stream_unary_rpc_method_handler(lazy)}) as channel:

            async def pour() -> AsyncIterator[bytes]:
                for _ in range(200):
                    sent[0] += 1
                    yield bytes(100_000)

            call = channel.stream_unary(path("Lazy"))(pour())
            await asyncio.sleep(0.5)
            assert sent[0] < 50
            assert await channel.unary_unary(path("Echo"))(b"x") == b"x"
            go.set()
            assert await call == b"20000000"

    run(main)


def test_windows_are_given_back() -> None:
    """However calls end, early or late, read or not, the connection's window does not shrink."""

    async def refuse(_requests: AsyncIterator[bytes], context: Any) -> bytes:
        await context.abort(StatusCode.ABORTED, "no")
        return b""

    async def main() -> None:
        handlers: dict[str, Any] = {
            "Refuse": grpc.stream_unary_rpc_method_handler(refuse),
            "Forever": grpc.stream_unary_rpc_method_handler(forever),
        }
        async with (
            running(handlers, options={"grpc.max_receive_message_length": 100_000}) as (server, address),
            Raw.connect(address) as client,
        ):
            for number in range(400):
                stream_id, window = 2 * number + 1, bytes(16_000)
                client.request(stream_id, name=("Refuse", "Forever", "None", "Echo")[number % 4], content=None, end=False)
                client.send(DataFrame(stream_id, message(bytes(60_000))[:16_000]), *[DataFrame(stream_id, window)] * 3)
                if number % 4 == 3:
                    client.send(DataFrame(stream_id, message(bytes(200_000))[:100]))
                client.send(RstStreamFrame(stream_id, error_code=CANCEL))
                if number % 10 == 0:
                    await client.ping()
            await client.ping()
            [connection] = server.connections
            assert not connection.calls
            assert server.active_calls == 0
            assert connection.session.local_window_size > 2**23  # updates are sent when half of it is used

    run(main)


# Limits.


def test_metadata_limit() -> None:
    """Up to the limit metadata is taken, beyond it a call ends with a sentence, always; far beyond, the connection is closed."""

    async def main() -> None:
        async with running() as (_, address):
            async with Raw.connect(address) as client:
                settings = await client.until(lambda frame: isinstance(frame, SettingsFrame))
                assert settings.settings[6] == 16_384  # type: ignore[attr-defined]
                for stream_id in range(1, 41, 4):
                    client.request(stream_id, k="v" * 12_000)
                    assert (await client.answer(stream_id))["grpc-status"] == "0"
                    client.request(stream_id + 2, k="v" * 8_000, l="v" * 9_000)
                    headers = await client.answer(stream_id + 2)
                    assert headers["grpc-status"] == str(StatusCode.RESOURCE_EXHAUSTED.value[0])
                    assert "may take 16384 bytes, got 17" in headers["grpc-message"]
            async with connect(address) as channel:
                error = await failure(channel.unary_unary(path("Echo"))(b"", metadata=(("k", "v" * 30_000),)))
                assert error.code() is StatusCode.RESOURCE_EXHAUSTED
                assert await channel.unary_unary(path("Echo"))(b"x", metadata=(("k", "v" * 12_000),)) == b"x"

    run(main)


def test_concurrent_streams() -> None:
    """Calls beyond the limit are an error of the client once it knows the limit; well-behaved ones wait."""

    async def main() -> None:
        async with running({"Forever": unary(forever)}, options={"grpc.max_concurrent_streams": 2}) as (_, address):
            async with Raw.connect(address) as client:
                await client.ping()
                for stream_id in (1, 3, 5):
                    client.request(stream_id, name="Forever")
                assert (await client.goaway()).error_code == PROTOCOL_ERROR
            async with connect(address) as channel:
                assert await asyncio.gather(*[channel.unary_unary(path("Echo"))(b"x") for _ in range(50)]) == [b"x"] * 50

    run(main)


# Manners.


def test_pings() -> None:
    """Pings are answered with their content; those that come too often end the connection, others do not."""
    patient = {"grpc.http2.min_recv_ping_interval_without_data_ms": 50, "grpc.keepalive_permit_without_calls": 1}

    async def main() -> None:
        async with running(options=patient) as (_, address), Raw.connect(address) as client:
            for number in range(8):
                client.send(PingFrame(opaque_data=b"%08d" % number))
                await client.until(lambda frame, n=number: isinstance(frame, PingFrame) and frame.opaque_data == b"%08d" % n)  # type: ignore[misc]
                await asyncio.sleep(0.06)
            for stream_id in range(1, 41, 2):  # after data any ping is welcome
                client.request(stream_id)
                await client.answer(stream_id)
                await client.ping()
            client.send(*[PingFrame(opaque_data=bytes(8))] * 4)
            goaway = await client.goaway()
            assert (goaway.error_code, goaway.additional_data) == (CALM, b"too_many_pings")

    run(main)


def test_pings_without_calls_are_rationed() -> None:
    """A client without calls may not ping unless the server permits it, as gRPC has it."""

    async def main() -> None:
        async with (
            running(options={"grpc.http2.min_recv_ping_interval_without_data_ms": 1}) as (_, address),
            Raw.connect(address) as client,
        ):
            for _ in range(4):
                client.send(PingFrame(opaque_data=bytes(8)))
                await asyncio.sleep(0.01)
            assert (await client.goaway()).additional_data == b"too_many_pings"

    run(main)


def test_keepalive() -> None:
    """A client that no longer answers pings is let go, and its calls are cancelled; one that does stays."""
    limits = {"grpc.keepalive_time_ms": 100, "grpc.keepalive_timeout_ms": 200}

    async def main() -> None:
        async with (
            running({"Forever": unary(forever)}, options=limits) as (server, address),
            Raw.connect(address) as client,
            connect(address) as channel,
        ):
            waiting = channel.unary_unary(path("Forever"))(b"")
            client.request(name="Forever")
            await eventually(lambda: server.active_calls == 2)
            assert isinstance((await client.rest())[-1], PingFrame)
            assert server.active_calls == 1
            await asyncio.sleep(1)
            assert not waiting.done()
            waiting.cancel()

    run(main)


@pytest.mark.parametrize(
    "sent", [b"", PREFACE[:10], PREFACE, PREFACE + bytes(5)], ids=["silent", "half a preface", "no settings", "half a frame"]
)
def test_slow_handshake(sent: bytes) -> None:
    """Who connects and does not get as far as SETTINGS is let go."""

    async def main() -> None:
        async with (
            running(options={"grpc.server_handshake_timeout_ms": 100}) as (server, address),
            Raw.connect(address, greet=False) as client,
        ):
            client.send(sent)
            with contextlib.suppress(ConnectionError):
                await client.reader.read()
            await eventually(lambda: not server.connections)

    run(main)


@pytest.mark.parametrize("drip", [False, True], ids=["stops", "drips"])
def test_slow_headers(drip: bool) -> None:  # noqa: FBT001
    """Who stops in the middle of headers, or sends them byte by byte, is let go; who is merely silent is not."""
    limits = {"grpc.server_handshake_timeout_ms": 100, "grpc.keepalive_timeout_ms": 200}

    async def main() -> None:
        async with running(options=limits) as (server, address), Raw.connect(address) as slow, Raw.connect(address) as silent:
            await silent.ping()
            await slow.ping()
            slow.send(HeadersFrame(1, slow.encoder.encode([(":method", "POST")])))  # no END_HEADERS
            block = ContinuationFrame(1, bytes(1000)).serialize()
            ended = asyncio.ensure_future(slow.rest())
            for byte in block:
                if drip:
                    slow.send(bytes([byte]))
                await asyncio.sleep(0.02)
                if ended.done():
                    break
            await ended
            assert len(server.connections) == 1
            silent.request()
            assert (await silent.answer())["grpc-status"] == "0"

    run(main)


def test_idle_and_age() -> None:
    """A connection without calls, and one that is old, end with GOAWAY and a reason; calls in flight are answered first."""

    async def slow(request: bytes, _context: Any) -> bytes:
        await asyncio.sleep(0.3)
        return request

    async def main() -> None:
        async with (
            running({"Slow": unary(slow)}, options={"grpc.max_connection_idle_ms": 100}) as (_, address),
            Raw.connect(address) as client,
        ):
            client.request(name="Slow")
            assert (await client.answer())["grpc-status"] == "0"
            assert (await client.goaway()).additional_data == b"connection idle"
        async with running({"Slow": unary(slow)}, options={"grpc.max_connection_age_ms": 100}) as (_, address):
            async with Raw.connect(address) as client:
                client.request(name="Slow")
                assert (await client.answer())["grpc-status"] == "0"
                assert (await client.goaway()).additional_data == b"max_age"
            async with connect(address) as channel:
                for _ in range(3):
                    assert await channel.unary_unary(path("Slow"))(b"x") == b"x"

    run(main)


def test_age_has_a_grace() -> None:
    """A call that goes on after an old connection's grace is UNAVAILABLE."""
    limits = {"grpc.max_connection_age_ms": 100, "grpc.max_connection_age_grace_ms": 100}

    async def main() -> None:
        async with calling({"Forever": unary(forever)}, options=limits) as channel:
            assert (await failure(channel.unary_unary(path("Forever"))(b""))).code() is StatusCode.UNAVAILABLE

    run(main)


# The end.


def test_drain_says_goaway_twice() -> None:
    """A call sent before the client knows of the end is accepted; the second GOAWAY follows its PING and names the last call."""

    async def main() -> None:
        async with running() as (server, address), Raw.connect(address) as client:
            client.request(1)
            await client.answer(1)
            stopping = asyncio.ensure_future(server.stop(10))
            first = await client.until(lambda frame: isinstance(frame, GoAwayFrame))
            assert (first.last_stream_id, first.error_code) == (2**31 - 1, 0)  # type: ignore[attr-defined]
            ping = await client.until(lambda frame: isinstance(frame, PingFrame))
            client.request(3, content=b"late")
            assert (await client.answer(3))["grpc-status"] == "0"
            client.send(PingFrame(opaque_data=ping.opaque_data, flags=["ACK"]))  # type: ignore[attr-defined]
            second = await client.until(lambda frame: isinstance(frame, GoAwayFrame))
            assert (second.last_stream_id, second.error_code) == (3, 0)  # type: ignore[attr-defined]
            client.request(5)  # ignored: it is above the last, and the client knows
            await client.rest()
            assert 5 not in client.headers
            await stopping

    run(main)


def test_stop_without_a_client_that_answers() -> None:
    """A client that answers no PING does not hold up the end for long, and what is in flight is answered."""

    async def slow(request: bytes, _context: Any) -> bytes:
        await asyncio.sleep(0.3)
        return request

    async def main() -> None:
        async with running({"Slow": unary(slow)}) as (server, address), Raw.connect(address) as client:
            client.request(name="Slow")
            await client.ping()
            begun = time.monotonic()
            await server.stop(20)
            assert time.monotonic() - begun < 5
            await client.rest()
            assert client.headers[1]["grpc-status"] == "0"
            assert await server.wait_for_termination(1) is False

    run(main)


@pytest.mark.parametrize("grace", [None, 0.2])
def test_stop_ends_what_is_left(grace: float | None) -> None:
    """After the grace, calls in flight are UNAVAILABLE and their handlers cancelled; the port takes no one."""
    cancelled = []

    async def method(_request: bytes, _context: Any) -> bytes:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise
        return b""

    async def main() -> None:
        async with running({"M": unary(method)}) as (server, address), connect(address) as channel:
            call = asyncio.ensure_future(failure(channel.unary_unary(path("M"))(b"")))
            await eventually(lambda: server.active_calls)
            await asyncio.sleep(0.05)
            await server.stop(grace)
            assert (await call).code() is StatusCode.UNAVAILABLE
            assert (await call).details() == "the server is stopping"
            assert (await failure(channel.unary_unary(path("Echo"))(b""))).code() is StatusCode.UNAVAILABLE

    run(main)
    assert cancelled == [1]


@pytest.mark.parametrize("round_", range(3))
def test_stop_under_load(round_: int) -> None:
    """While a server stops, clients without retries see answers or UNAVAILABLE, and what was accepted is answered."""
    accepted, answered, codes = [0], [0], set()

    async def count(request: bytes, _context: Any) -> bytes:
        accepted[0] += 1
        await asyncio.sleep(0.01 * (round_ + 1))
        return request

    async def caller(channel: Any) -> None:
        while True:
            try:
                await channel.unary_unary(path("Count"))(b"x")
                answered[0] += 1
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
                return

    async def main() -> None:
        async with running({"Count": unary(count)}) as (server, address):
            channels = [connect(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
            callers = [asyncio.ensure_future(caller(channel)) for channel in channels for _ in range(25)]
            await asyncio.sleep(0.5)
            await server.stop(10)
            await asyncio.wait(callers)
            for channel in channels:
                await channel.close()

    run(main)
    assert codes <= {StatusCode.UNAVAILABLE}
    assert answered == accepted


# Abuse. Each of these must end with a GOAWAY or be harmless, and leave the server with other clients.


async def check_alive(address: str) -> None:
    """The server answers others."""
    async with Raw.connect(address) as client:
        client.request()
        assert (await client.answer())["grpc-status"] == "0"


def test_rapid_reset() -> None:
    """Calls that are reset at once, again and again (CVE-2023-44487), end the connection; few do not, and no handler stays."""
    began, ended = [0], [0]

    async def method(_request: bytes, _context: Any) -> bytes:
        began[0] += 1
        try:
            await asyncio.sleep(3600)
        finally:
            ended[0] += 1
        return b""

    async def main() -> None:
        async with running({"M": unary(method)}) as (server, address):
            async with Raw.connect(address) as client:
                for number in range(12_000):
                    client.request(2 * number + 1, name="M")
                    client.send(RstStreamFrame(2 * number + 1, error_code=CANCEL))
                    if number == 500:
                        await client.ping()  # still welcome
                assert (await client.goaway()).error_code != 0
            await check_alive(address)
            await eventually(lambda: not server.active_calls)
            await asyncio.sleep(0.05)
            assert began == ended

    run(main)


def test_made_you_reset() -> None:
    """Frames that oblige the server to reset a stream, again and again (CVE-2025-8671), end the connection."""

    async def main() -> None:
        async with running({"Forever": unary(forever)}) as (server, address):
            async with Raw.connect(address) as client:
                for number in range(15_000):
                    client.request(2 * number + 1, name="Forever")
                    client.send(WindowUpdateFrame(2 * number + 1, window_increment=1).serialize()[:-1] + b"\0")  # an increment of 0
                await client.rest()
            await check_alive(address)
            await eventually(lambda: not server.active_calls)

    run(main)


@pytest.mark.parametrize(
    "frame",
    [
        SettingsFrame(settings={1: 4096}),
        PingFrame(opaque_data=bytes(8)),
        PriorityFrame(1, depends_on=0),
        WindowUpdateFrame(0, window_increment=1),
    ],
    ids=["settings", "ping", "priority", "window update"],
)
def test_floods(frame: Any) -> None:
    """100,000 frames that mean nothing end the connection or are harmless, and take no memory."""

    async def main() -> None:
        async with running() as (_, address):
            async with Raw.connect(address) as client:
                tracemalloc.start()
                try:
                    for _ in range(100):
                        client.send(frame.serialize() * 1000)
                        await asyncio.sleep(0)
                    await asyncio.sleep(0.2)
                    assert tracemalloc.get_traced_memory()[0] < 20e6
                finally:
                    tracemalloc.stop()
            await check_alive(address)

    run(main)


def test_empty_frames() -> None:
    """Empty DATA frames (CVE-2019-9518) and messages of no bytes are harmless, or end the call."""

    async def main() -> None:
        async with running() as (server, address):
            async with Raw.connect(address) as client:
                client.request(1, content=None, end=False)
                client.send(DataFrame(1).serialize() * 5_000)
                client.send(DataFrame(1, message(b"x"), flags=["END_STREAM"]))
                assert (await client.answer(1))["grpc-status"] == "0"
                client.request(3, content=None, end=False)
                client.send(DataFrame(3, message(b"") * 3000).serialize() * 4)
                assert (await client.answer(3))["grpc-status"] == "12"
                assert server.active_calls == 0
                client.request(5, content=None, end=False)
                client.send(DataFrame(5).serialize() * 50_000)
                await client.goaway()
            await check_alive(address)

    run(main)


def test_refused_and_reset_at_once() -> None:
    """A request that is refused, or answered, and is reset in the same read, leaves the connection as it is."""

    async def main() -> None:
        async with running() as (_, address), Raw.connect(address) as client:
            for stream_id, fields in (
                (1, {"content_type": "text/plain"}),
                (3, {"grpc_timeout": "x"}),
                (5, {"__method": "GET"}),
                (7, {}),
            ):
                client.request(stream_id, content=None, end=False, **fields)
                client.send(RstStreamFrame(stream_id, error_code=CANCEL))
            client.request(9)
            assert (await client.answer(9))["grpc-status"] == "0"

    run(main)


def test_goaway_names_the_last_call() -> None:
    """The GOAWAY after an attack tells which calls were accepted: a client must not send those again."""

    async def main() -> None:
        async with running({"Forever": unary(forever)}) as (_, address), Raw.connect(address) as client:
            client.request(1, name="Forever")
            await client.ping()
            client.send(HeadersFrame(3, client.encoder.encode([(":method", "POST")])))
            client.send(ContinuationFrame(3, client.encoder.encode([("x", "y")])).serialize() * 1000)
            assert (await client.goaway()).last_stream_id == 1

    run(main)


def test_continuation_flood() -> None:
    """Headers that never end (CVE-2024-27316) end the connection."""

    async def main() -> None:
        async with running() as (_, address):
            async with Raw.connect(address) as client:
                client.send(HeadersFrame(1, client.encoder.encode([(":method", "POST")])))
                client.send(ContinuationFrame(1, client.encoder.encode([("x", "y")])).serialize() * 1000)
                assert (await client.goaway()).error_code == CALM
            await check_alive(address)

    run(main)


def test_hpack_bomb() -> None:
    """Kilobytes that decode to megabytes of headers end the connection before they are decoded."""

    async def main() -> None:
        async with running() as (_, address):
            async with Raw.connect(address) as client:
                client.request(1, bomb="x" * 4000)
                await client.answer(1)
                client.encoder.header_table_size = 4096
                index = bytes([0x80 | 62])  # the first entry of the dynamic table: `bomb`, or what came after it
                block = client.encoder.encode([(":method", "POST")]) + index * 16_000
                client.send(HeadersFrame(3, block, flags=["END_HEADERS", "END_STREAM"]))
                await client.goaway()
            async with Raw.connect(address) as client:
                client.send_headers(1, [(f"k{number}", "v") for number in range(1500)], end=True)
                assert (await client.goaway()).error_code in (CALM, PROTOCOL_ERROR)
            await check_alive(address)

    run(main)


def test_starved_windows() -> None:
    """Clients that take no answers hold a bounded amount of memory for a bounded time, and their handlers are done."""

    async def large(_request: bytes, _context: Any) -> bytes:
        return bytes(100_000)

    async def main() -> None:
        async with running({"Large": unary(large)}, options={"grpc.max_concurrent_streams": 50}) as (server, address):
            object.__setattr__(server.limits, "send_seconds", 0.3)
            async with Raw.connect(address, {WINDOW: 0}) as client:
                for number in range(50):
                    client.request(2 * number + 1, name="Large")
                await client.until(lambda frame: isinstance(frame, HeadersFrame) and frame.stream_id == 99)
                [connection] = server.connections
                assert server.active_calls == 0
                assert 0 < connection.session.queued_body_size() < 6_000_000
                await client.until(lambda frame: isinstance(frame, RstStreamFrame) and frame.stream_id == 99)
                assert connection.session.queued_body_size() == 0
                assert not connection.calls

    run(main)


def test_half_closed_never() -> None:
    """A client that never ends its request does not hold its stream once the call has been answered."""

    async def main() -> None:
        async with running() as (server, address):
            object.__setattr__(server.limits, "send_seconds", 0.3)
            async with Raw.connect(address) as client:
                client.request(1, name="None", content=None, end=False)
                await client.until(lambda frame: isinstance(frame, RstStreamFrame))
                assert client.headers[1]["grpc-status"] == "12"

    run(main)


def test_connection_lost() -> None:
    """A client that vanishes cancels its calls."""

    async def main() -> None:
        async with running({"Forever": unary(forever)}) as (server, address):
            async with Raw.connect(address) as client:
                for number in range(20):
                    client.request(2 * number + 1, name="Forever")
                await client.ping()
                assert server.active_calls == 20
                client.writer.transport.abort()
            await eventually(lambda: not (server.active_calls or server.connections))

    run(main)
