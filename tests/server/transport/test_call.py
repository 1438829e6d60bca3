"""Calls, over nghttp2 and over grpcio: a handler and a client cannot tell which."""

import asyncio
import inspect
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from tercet.server import transport

from tests.server.transport.conftest import calling, connect, eventually, failure, path, run, running, unary

Make = Callable[..., Any]


async def double(request: bytes, _context: Any) -> AsyncIterator[bytes]:
    """Answer twice."""
    yield request
    yield request


async def join(requests: AsyncIterator[bytes], _context: Any) -> bytes:
    """All requests in one answer."""
    return b"".join([request async for request in requests])


async def upper(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    """Each request in capitals."""
    async for request in requests:
        yield request.upper()


async def read_and_write(_requests: Any, context: Any) -> None:
    """The same by the context's own methods."""
    while (request := await context.read()) is not grpc.aio.EOF:
        await context.write(request.upper())


KINDS: dict[str, Any] = {
    "Double": grpc.unary_stream_rpc_method_handler(double),
    "Join": grpc.stream_unary_rpc_method_handler(join),
    "Upper": grpc.stream_stream_rpc_method_handler(upper),
    "ReadWrite": grpc.stream_stream_rpc_method_handler(read_and_write),
}


def test_all_kinds(make: Make) -> None:
    """Unary and streaming calls carry messages of any size, empty ones and those larger than a flow-control window included."""
    sizes = [b"", b"a", b"b" * 5, b"c" * 70_000, b"d" * 3_000_000]

    async def main() -> None:
        async with calling(KINDS, make=make) as channel:
            for content in sizes:
                assert await channel.unary_unary(path("Echo"))(content) == content
                assert [response async for response in channel.unary_stream(path("Double"))(content)] == [content] * 2
            assert await channel.stream_unary(path("Join"))(iter(sizes)) == b"".join(sizes)
            assert await channel.stream_unary(path("Join"))(iter([])) == b""
            for name in ("Upper", "ReadWrite"):
                responses = channel.stream_stream(path(name))(iter(sizes))
                assert [response async for response in responses] == [content.upper() for content in sizes]

    run(main)


def test_ping_pong(make: Make) -> None:
    """A stream's answer comes before its next request is sent, and `read` at the end gives EOF."""

    async def main() -> None:
        async with calling(KINDS, make=make) as channel:
            call = channel.stream_stream(path("Upper"))()
            for content in (b"a", b"b", b"c"):
                await call.write(content)
                assert await call.read() == content.upper()
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is StatusCode.OK

    run(main)


def test_metadata_both_ways(make: Make) -> None:
    """Metadata arrives in order, several values of a key too, and binary values unchanged; so do initial and trailing metadata."""
    sent = (("a", "1"), ("b-bin", bytes(range(256))), ("a", "2"), ("c-bin", b""), ("d", "x y"), ("b-bin", b"\0"))
    seen: list[Any] = []

    async def method(request: bytes, context: Any) -> bytes:
        seen.extend((entry.key, entry.value) for entry in context.invocation_metadata() if entry.key != "user-agent")
        await context.send_initial_metadata((("i", "1"), ("i-bin", b"\xff")))
        context.set_trailing_metadata((("t", "1"), ("t-bin", b"\xfe"), ("t", "2")))
        assert context.trailing_metadata() == (("t", "1"), ("t-bin", b"\xfe"), ("t", "2"))
        return request

    async def main() -> None:
        async with calling({"M": unary(method)}, make=make) as channel:
            call = channel.unary_unary(path("M"))(b"", metadata=sent)
            assert tuple(await call.initial_metadata()) == (("i", "1"), ("i-bin", b"\xff"))
            assert await call == b""
            assert sorted(await call.trailing_metadata()) == [("t", "1"), ("t", "2"), ("t-bin", b"\xfe")]

    run(main)
    assert sorted(seen) == sorted(sent)
    assert [value for key, value in seen if key == "a"] == ["1", "2"]


@pytest.mark.parametrize(
    "details", ["plain", '100 % of \t\n"ümläut" ☺ 😀', "", "a" * 2000], ids=["plain", "special", "empty", "long"]
)
def test_abort(make: Make, details: str) -> None:
    """`abort` ends a call with its code, its text whatever it contains, and its metadata, and runs nothing after it."""
    after: list[Any] = []

    async def method(_request: bytes, context: Any) -> bytes:
        await context.abort(StatusCode.OUT_OF_RANGE, details, (("grpc-status-details-bin", b"\0\1"), ("k", "v")))
        after.append("abort returned")
        return b""

    async def main() -> None:
        async with calling({"M": unary(method)}, make=make) as channel:
            error = await failure(channel.unary_unary(path("M"))(b""))
            assert (error.code(), error.details()) == (StatusCode.OUT_OF_RANGE, details)
            assert sorted(error.trailing_metadata()) == [("grpc-status-details-bin", b"\0\1"), ("k", "v")]

    run(main)
    assert not after


def test_abort_in_a_stream(make: Make) -> None:
    """What was yielded before an `abort` arrives; a second `abort`, and `write` after it, are errors of the handler."""

    async def method(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        try:
            await context.abort(StatusCode.ABORTED, "enough")
        finally:
            with pytest.raises(grpc.aio.UsageError):
                await context.abort(StatusCode.ABORTED, "again")
            with pytest.raises(grpc.aio.AbortError):
                await context.write(b"second")

    async def main() -> None:
        async with calling({"M": grpc.unary_stream_rpc_method_handler(method)}, make=make) as channel:
            call = channel.unary_stream(path("M"))(b"")
            assert await call.read() == b"first"
            error = await failure(call.read())
            assert (error.code(), error.details()) == (StatusCode.ABORTED, "enough")

    run(main)


def test_code_and_details_without_abort(make: Make) -> None:
    """`set_code` and `set_details` end a call when the handler returns; the response is dropped then."""
    seen: list[Any] = []

    async def method(request: bytes, context: Any) -> bytes:
        seen.append((context.code(), context.details()))
        context.set_code(StatusCode[request.decode()])
        context.set_details("so")
        seen.append((context.code(), context.details()))
        return b"answer"

    async def main() -> None:
        async with calling({"M": unary(method)}, make=make) as channel:
            error = await failure(channel.unary_unary(path("M"))(b"NOT_FOUND"))
            assert (error.code(), error.details()) == (StatusCode.NOT_FOUND, "so")
            assert await channel.unary_unary(path("M"))(b"OK") == b"answer"

    run(main)
    assert seen[:2] == [(None, ""), (StatusCode.NOT_FOUND, "so")]


def test_exceptions(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """What a handler raises is UNKNOWN with its type and text, or the code that it has set, and is logged with a traceback."""

    async def fails(request: bytes, context: Any) -> bytes:
        if request:
            context.set_code(StatusCode.DATA_LOSS)
        raise ValueError("broken")

    async def fails_late(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        raise ValueError("broken")

    async def main() -> None:
        async with calling({"M": unary(fails), "S": grpc.unary_stream_rpc_method_handler(fails_late)}, make=make) as channel:
            error = await failure(channel.unary_unary(path("M"))(b""))
            assert (error.code(), error.details()) == (StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>: broken")
            assert (await failure(channel.unary_unary(path("M"))(b"x"))).code() is StatusCode.DATA_LOSS
            call = channel.unary_stream(path("S"))(b"")
            assert await call.read() == b"one"
            assert (await failure(call.read())).code() is StatusCode.UNKNOWN

    with caplog.at_level(logging.ERROR):
        run(main)
    assert caplog.text.count("ValueError: broken") == 3
    assert path("M") in caplog.text


def test_unknown_methods(make: Make) -> None:
    """A method that no handler has is UNIMPLEMENTED."""

    async def main() -> None:
        async with calling(make=make) as channel:
            for wrong in (path("Nothing"), "/other.Service/Echo", "/x"):
                error = await failure(channel.unary_unary(wrong)(b""))
                assert (error.code(), error.details()) == (StatusCode.UNIMPLEMENTED, "Method not found!")

    run(main)


def test_deadline(make: Make) -> None:
    """A handler knows the time that remains, and is cancelled when it is over."""
    remaining: list[float | None] = []
    cancelled = asyncio.Event()

    async def method(request: bytes, context: Any) -> bytes:
        remaining.append(context.time_remaining())
        try:
            await asyncio.sleep(0 if request else 60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return request

    async def main() -> None:
        async with calling({"M": unary(method)}, make=make) as channel:
            assert await channel.unary_unary(path("M"))(b"x") == b"x"
            assert await channel.unary_unary(path("M"))(b"x", timeout=3600) == b"x"
            error = await failure(channel.unary_unary(path("M"))(b"", timeout=0.2))
            assert error.code() is StatusCode.DEADLINE_EXCEEDED
            assert "Deadline Exceeded" in (error.details() or "")
            await cancelled.wait()

    run(main)
    assert remaining[0] is None
    assert 3500 < (remaining[1] or 0) <= 3660  # gRPC rounds up what it sends
    assert (remaining[2] or 0) <= 0.25


def test_cancellation(make: Make) -> None:
    """A call that its client cancels is cancelled in its handler, which sees that; its callbacks run, and others go on."""
    contexts: list[Any] = []
    events: list[str] = []
    started = asyncio.Event()

    async def method(_request: bytes, context: Any) -> bytes:
        contexts.append(context)
        context.add_done_callback(lambda _: events.append("callback"))
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise
        return b""

    async def main() -> None:
        async with calling({"M": unary(method)}, make=make) as channel:
            call = channel.unary_unary(path("M"))(b"")
            await started.wait()
            assert not contexts[0].cancelled()
            assert not contexts[0].done()
            call.cancel()
            await eventually(lambda: len(events) == 2)
            assert await channel.unary_unary(path("Echo"))(b"x") == b"x"

    run(main)
    assert events == ["cancelled", "callback"]


def test_callbacks_run_once(make: Make) -> None:
    """`add_done_callback` gets the context once the handler has ended, also when it failed."""
    contexts: list[Any] = []
    done: list[Any] = []

    async def method(request: bytes, context: Any) -> bytes:
        contexts.append(context)
        context.add_done_callback(done.append)
        if request:
            raise ValueError
        return b""

    async def main() -> None:
        async with calling({"M": unary(method)}, make=make) as channel:
            await channel.unary_unary(path("M"))(b"")
            await failure(channel.unary_unary(path("M"))(b"x"))
            await eventually(lambda: len(done) == 2)

    run(main)
    assert done == contexts


def test_serializers(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Requests and responses go through the handler's functions; one that raises ends the call."""

    async def method(request: Any, _context: Any) -> Any:
        return request + 1

    handler: Any = grpc.unary_unary_rpc_method_handler(
        method, request_deserializer=int, response_serializer=lambda number: b"%d" % number
    )

    async def main() -> None:
        async with calling({"M": handler}, make=make) as channel:
            assert await channel.unary_unary(path("M"))(b"41") == b"42"
            assert (await failure(channel.unary_unary(path("M"))(b"x"))).code() is not StatusCode.OK

    run(main)
    assert caplog.text


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize("where", ["client", "server", "context"])
def test_compression(make: Make, compression: Any, where: str) -> None:
    """Requests may be compressed, and so are answers when the server or the handler says so."""

    async def method(request: bytes, context: Any) -> AsyncIterator[bytes]:
        if where == "context":
            context.set_compression(compression)
        yield request
        context.disable_next_message_compression()
        yield request

    async def main() -> None:
        arguments: dict[str, Any] = {"compression": compression} if where == "server" else {}
        async with (
            running({"M": grpc.unary_stream_rpc_method_handler(method)}, make=make, **arguments) as (_, address),
            connect(address, compression=compression if where == "client" else None) as channel,
        ):
            for content in (b"a" * 100_000, b"", b"a"):
                assert [response async for response in channel.unary_stream(path("M"))(content)] == [content] * 2
                assert await channel.unary_unary(path("Echo"))(content) == content

    run(main)


def test_limits_of_messages(make: Make) -> None:
    """A request that is larger than the limit, also once it is decompressed, is RESOURCE_EXHAUSTED, and the connection goes on."""

    async def main() -> None:
        async with calling(KINDS, make=make, options={"grpc.max_receive_message_length": 1000}) as channel:
            for content, compression in ((bytes(1001), None), (bytes(10**7), None), (bytes(10**7), grpc.Compression.Gzip)):
                error = await failure(channel.unary_unary(path("Echo"))(content, compression=compression))
                assert error.code() is StatusCode.RESOURCE_EXHAUSTED
                assert "larger than max" in (error.details() or "")
            assert await channel.unary_unary(path("Echo"))(bytes(1000)) == bytes(1000)

    run(main)


def test_concurrent_rpcs(make: Make) -> None:
    """Calls beyond `maximum_concurrent_rpcs` are RESOURCE_EXHAUSTED."""

    async def main() -> None:
        release = asyncio.Event()

        async def method(request: bytes, _context: Any) -> bytes:
            await release.wait()
            return request

        async with calling({"M": unary(method)}, make=make, maximum_concurrent_rpcs=2) as channel:
            calls = [channel.unary_unary(path("M"))(b"x") for _ in range(3)]
            done, _ = await asyncio.wait([asyncio.ensure_future(call.code()) for call in calls], return_when="FIRST_COMPLETED")
            assert [task.result() for task in done] == [StatusCode.RESOURCE_EXHAUSTED]
            release.set()
            assert sorted([(await call.code()).name for call in calls]) == ["OK", "OK", "RESOURCE_EXHAUSTED"]

    run(main)


class Recorder(grpc.aio.ServerInterceptor):
    """Writes down what it sees, and refuses calls without a token."""

    def __init__(self, name: str, seen: list[Any]) -> None:
        self.name, self.seen = name, seen

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        metadata = dict(handler_call_details.invocation_metadata)
        self.seen.append((self.name, handler_call_details.method, metadata.get("token")))
        if "token" not in metadata:

            async def refuse(_request: Any, context: Any) -> None:
                await context.abort(StatusCode.UNAUTHENTICATED, "no token")

            return unary(refuse)
        return await continuation(handler_call_details)


def test_interceptors(make: Make) -> None:
    """Interceptors run in their order for each kind of call, see its method and metadata, and may answer themselves."""
    seen: list[Any] = []

    async def main() -> None:
        async with calling(KINDS, make=make, interceptors=[Recorder("a", seen), Recorder("b", seen)]) as channel:
            token = (("token", "t"),)
            assert await channel.unary_unary(path("Echo"))(b"x", metadata=token) == b"x"
            assert [r async for r in channel.stream_stream(path("Upper"))(iter([b"x"]), metadata=token)] == [b"X"]
            assert (await failure(channel.unary_unary(path("Echo"))(b"x"))).code() is StatusCode.UNAUTHENTICATED
            assert (await failure(channel.unary_unary(path("No"))(b"x", metadata=token))).code() is StatusCode.UNIMPLEMENTED

    run(main)
    expected = [(name, path(method), "t") for method in ("Echo", "Upper") for name in "ab"]
    assert seen == [*expected, ("a", path("Echo"), None), ("a", path("No"), "t"), ("b", path("No"), "t")]


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0", "[::]:0", "0.0.0.0:0", "unix"])
def test_addresses_and_peers(make: Make, address: str, tmp_path: Any) -> None:
    """IPv4, IPv6, both, and Unix domain sockets; `peer` and `auth_context` are what gRPC gives."""
    if address == "unix":
        address = f"unix:{tmp_path}/socket"
    peers: list[Any] = []

    async def method(request: bytes, context: Any) -> bytes:
        peers.append((context.peer(), dict(context.auth_context()), context.peer_identities(), context.peer_identity_key()))
        return request

    async def main() -> None:
        async with running({"M": unary(method)}, make=make, address=address) as (_, bound):
            targets = {"[::]": ["127.0.0.1", "[::1]"], "0.0.0.0": ["127.0.0.1"]}.get(bound.rpartition(":")[0])  # noqa: S104
            for target in [f"{host}:{bound.rpartition(':')[2]}" for host in targets] if targets else [bound]:
                async with connect(target) as channel:
                    assert await channel.unary_unary(path("M"))(b"x") == b"x"

    run(main)
    for peer, *security in peers:
        assert peer.startswith(("ipv4:127.0.0.1:", "ipv6:%5B::1%5D:", "unix:"))
        assert security == [{"transport_security_type": [b"insecure"], "security_level": [b"TSI_SECURITY_NONE"]}, None, None]


def test_unix_socket_of_a_dead_server(tmp_path: Path) -> None:
    """A socket file that a dead server has left is replaced, that of a live one is an error, and it goes with the server."""
    where = tmp_path / "socket"

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(where))
        async with running(address=f"unix:{where}") as (_, address), connect(address) as channel:
            assert await channel.unary_unary(path("Echo"))(b"x") == b"x"
            with pytest.raises(RuntimeError, match="Address already in use"):
                transport.server().add_insecure_port(address)
        assert not where.exists()

    run(main)


@pytest.mark.parametrize("address", ["127.0.0.1:x", "unix:/no/such/folder/socket", "no.such.host.invalid:0", "192.0.2.1:0"])
def test_addresses_that_cannot_be_bound(address: str) -> None:
    """An address that is wrong or not of this machine is a RuntimeError, as in grpc.aio."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match="Failed to bind to address"):
            transport.server().add_insecure_port(address)

    run(main)


def test_arguments_are_those_of_grpcio() -> None:
    """`transport.server` takes what grpc.aio.server takes, under the same names and in the same order."""
    ours, theirs = (inspect.signature(make).parameters for make in (transport.server, grpc.aio.server))
    assert list(ours) == list(theirs)


def test_many_calls_at_once(make: Make) -> None:
    """Thousands of calls on one connection get their own answers."""

    async def main() -> None:
        async with calling(make=make, options={"grpc.server.max_pending_requests": 10_000}) as channel:
            echo = channel.unary_unary(path("Echo"))
            contents = [b"%d" % number for number in range(3000)]
            assert await asyncio.gather(*[echo(content) for content in contents]) == contents

    run(main)
