"""One call: the context that its handler gets, and the order of things from the first header to the status.

    HEADERS -> a task: interceptors, handler <- messages, as DATA comes
                                     handler -> HEADERS, DATA, trailers with the status

A call ends once, by whatever comes first: the handler's answer, its error, `abort`, the deadline, the client's RST_STREAM, or the
server's stop. What comes after that changes nothing.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import ngh2
from grpc import Compression, StatusCode

from tercet.server.transport import wire
from tercet.server.transport.wire import CallError, Headers

if TYPE_CHECKING:
    from tercet.server.transport.connection import Connection

log = logging.getLogger(__name__)

RESPONSE: Headers = ((b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-accept-encoding", wire.ACCEPTED))
CODES = {code.value[0]: code for code in StatusCode}
SEND_BUFFER_BYTES = 2**16  # of a stream's messages that may wait for the client; then `write` waits


class Call(grpc.aio.ServicerContext[Any, Any]):
    """A call of a client. Handlers use what grpc.aio.ServicerContext has; the rest is for Connection."""

    handler: Any = None
    path = b""
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    deadline: float | None = None  # of time.monotonic
    half_closed = False  # the client has sent all that it sends
    headers_sent = False
    finished_at: float | None = None  # time.monotonic; the status was sent, or nobody waits for it
    client_gone = False
    writer: asyncio.Future[None] | None = None  # waits for room
    _reader: asyncio.Future[None] | None = None  # waits for a message
    _request_encoding = b""
    _response_encoding: bytes | None = None
    _compress_next = True
    _initial: Headers = ()
    _trailers: Headers = ()
    _trailing_metadata: Any = ()
    _metadata: tuple[wire.Metadatum, ...] | None = None
    _code: StatusCode | None = None
    _details = ""
    _aborted = False

    def __init__(self, connection: "Connection", stream_id: int, headers: Headers) -> None:
        self.connection, self.stream_id, self._headers = connection, stream_id, headers
        self.fields: Mapping[bytes, bytes] = dict(headers)
        self._buffer: bytes | bytearray = b""  # of a message that is not complete
        self._messages: deque[tuple[int, bytes]] = deque()  # whether it is compressed; decompressed only when it is read
        self._unacknowledged = 0  # bytes that the client's window does not have back

    def start(self) -> None:
        """Look at the headers and begin. Raises CallError."""
        fields, server = self.fields, self.connection.server
        self.path = fields.get(b":path", b"")
        self._request_encoding = wire.check_encoding(fields.get(b"grpc-encoding", b""))
        if timeout := fields.get(b"grpc-timeout"):
            seconds = wire.decode_timeout(timeout)
            self.deadline = time.monotonic() + seconds
            self.timer = server.loop.call_later(
                min(seconds, 1e6), self.interrupt, StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
            )
        if server.compression:
            self.set_compression(server.compression)
        self.task = server.loop.create_task(self._run())

    # From the client.

    def receive(self, data: bytes, *, end_stream: bool) -> None:
        """Take the content of a DATA frame."""
        self._unacknowledged += len(data)
        self.half_closed = self.half_closed or end_stream
        if self.finished_at is not None:
            self.acknowledge()
            return
        try:
            self._split(data)
        except CallError as error:
            self.interrupt(error.code, str(error))
            return
        if not self._messages:
            self.acknowledge()  # else the rest of a message that is larger than the window could not come
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    def _split(self, data: bytes) -> None:
        """Cut messages out of what has come so far. Raises CallError."""
        limit, start = self.connection.server.limits.message_bytes, 0
        content: bytes | bytearray = data
        if self._buffer:
            content = self._buffer
            content += data
        while len(content) - start >= wire.PREFIX.size:
            compressed, size = wire.PREFIX.unpack_from(content, start)
            if size > limit:
                raise CallError(StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max ({size} vs. {limit})")
            begin, end = start + wire.PREFIX.size, start + wire.PREFIX.size + size
            if len(content) < end:
                break
            self._messages.append((compressed, bytes(content[begin:end])))
            start = end
        self._buffer = b"" if start == len(content) else bytearray(content[start:]) if start or content is data else content
        if self._buffer and self.half_closed:
            raise CallError(StatusCode.INVALID_ARGUMENT, "the request ends in the middle of a message")

    def acknowledge(self) -> None:
        """Give the client's flow-control windows back what has been taken."""
        if self._unacknowledged:
            self.connection.acknowledge(self._unacknowledged, self.stream_id)
            self._unacknowledged = 0

    def closed(self) -> None:
        """The stream is closed: all is done, or the client has reset it."""
        self.acknowledge()
        if self.finished_at is None:
            self.client_gone, self._code = True, StatusCode.CANCELLED
            self._finish()
            self._cancel()

    async def _wait_for_message(self) -> None:
        self._reader = self.connection.server.loop.create_future()
        await self._reader

    def _take_message(self) -> bytes:
        """The first message. One that cannot be decompressed ends the call, and its handler as if it had been cancelled."""
        compressed, message = self._messages.popleft()
        if not self._messages:
            self.acknowledge()
        if not compressed:
            return message
        try:
            return wire.decompress(message, self._request_encoding, self.connection.server.limits.message_bytes)
        except CallError as error:
            self.end(error.code, str(error))
            raise asyncio.CancelledError(str(error)) from error

    async def _only_message(self) -> bytes:
        """The one message of a call whose request is not a stream. Raises CallError ("Status codes": UNIMPLEMENTED)."""
        while not self.half_closed and len(self._messages) < 2:  # noqa: PLR2004  one more than expected
            await self._wait_for_message()
        if len(self._messages) != 1:
            raise CallError(StatusCode.UNIMPLEMENTED, f"expected one request message, got {'more' if self._messages else 'none'}")
        return self._take_message()

    async def _request_iterator(self) -> AsyncIterator[Any]:
        while (request := await self.read()) is not grpc.aio.EOF:
            yield request

    # To the client.

    async def _run(self) -> None:
        """Find the handler and answer with what it returns or raises, as grpc.aio does."""
        try:
            await self._call_handler()
        except CallError as error:
            self.end(error.code, str(error))
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            self.end(StatusCode.CANCELLED, "the handler was cancelled")
        except Exception as error:
            if self.finished_at is None:
                path = self.path.decode(errors="replace")
                log.exception("Unexpected [%s] raised by servicer method [%s]", type(error).__name__, path)
                self.end(self._code or StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}")

    async def _call_handler(self) -> None:
        server = self.connection.server
        self.handler = handler = server.registered_handler(self.path) or await server.find_handler(self)
        if handler is None:
            raise CallError(StatusCode.UNIMPLEMENTED, "Method not found!")
        request: Any = self._request_iterator() if handler.request_streaming else self._decode(await self._only_message())
        if not handler.response_streaming:
            response = await (handler.stream_unary or handler.unary_unary)(request, self)
            succeeded = self._code in (None, StatusCode.OK)  # else what it returned is of no interest
            self.end(self._code or StatusCode.OK, self._details, self._encode(response) if succeeded else None)
            return
        responses = (handler.stream_stream or handler.unary_stream)(request, self)
        if hasattr(responses, "__aiter__"):
            async with aclosing(responses):
                async for response in responses:
                    await self.write(response)
        else:  # a coroutine that calls `write` itself
            await responses
        self.end(self._code or StatusCode.OK, self._details)

    def _decode(self, message: bytes) -> Any:
        deserializer = self.handler.request_deserializer
        return deserializer(message) if deserializer else message

    def _encode(self, response: Any) -> bytes:
        serializer, compress = self.handler.response_serializer, self._compress_next
        self._compress_next = True
        return wire.encode_message(serializer(response) if serializer else response, self._response_encoding if compress else None)

    def _send_headers(self) -> None:
        encoding = ((b"grpc-encoding", self._response_encoding),) if self._response_encoding else ()
        self.connection.session.send_response(self.stream_id, RESPONSE + encoding + self._initial)
        self.headers_sent = True

    def end(self, code: StatusCode, details: str = "", message: bytes | None = None) -> None:
        """End with a status, after a last message if there is one; do nothing if the call has ended already."""
        if self.finished_at is not None:
            return
        self._code, self._details = code, details
        session, trailers = self.connection.session, wire.status_headers(code, details) + self._trailers
        try:
            if code is not StatusCode.OK and not self.headers_sent:  # "Trailers-Only"
                session.send_response(self.stream_id, RESPONSE + self._initial + trailers, end_stream=True)
            else:
                if not self.headers_sent:
                    self._send_headers()
                if message is not None:
                    session.send_data(self.stream_id, message)
                session.send_trailers(self.stream_id, trailers)
        except ngh2.NGH2Error as error:  # the stream or the connection has just been closed
            log.debug("%s: %s", self.path, error)
        self._finish()

    def refuse(self, http_status: bytes) -> None:
        """End a request that is not gRPC."""
        with suppress(ngh2.NGH2Error):  # the client has just reset it
            self.connection.session.send_response(self.stream_id, ((b":status", http_status),), end_stream=True)
        self._finish()

    def interrupt(self, code: StatusCode, details: str) -> None:
        """End from outside of the handler, and stop that."""
        self.end(code, details)
        self._cancel()

    def _cancel(self) -> None:
        if self.task and self.task is not asyncio.current_task():
            self.task.cancel()

    def _finish(self) -> None:
        """Let go of what waits for the call. Its stream stays open until the client has taken everything."""
        self.finished_at = time.monotonic()
        self._messages.clear()
        self._buffer = b""
        self.acknowledge()
        if self.timer:
            self.timer.cancel()
        if self.writer and not self.writer.done():
            self.writer.set_result(None)
        self.connection.call_finished(self.finished_at)

    def _check_unfinished(self) -> None:
        if self._aborted:
            raise grpc.aio.AbortError("Locally aborted.")
        if self.client_gone:
            raise asyncio.CancelledError("Cancelled by the client")
        if self.finished_at is not None:
            raise grpc.aio.UsageError("RPC already finished.")

    # grpc.aio.ServicerContext

    async def read(self) -> Any:
        self._check_unfinished()
        while not self._messages:
            if self.half_closed:
                return grpc.aio.EOF
            await self._wait_for_message()
        return self._decode(self._take_message())

    async def write(self, message: Any) -> None:
        """Send a response; waits while the client does not take what was sent before."""
        self._check_unfinished()
        connection = self.connection
        if not self.headers_sent:
            self._send_headers()
        connection.session.send_data(self.stream_id, self._encode(message))
        connection.sent = True
        connection.wake()
        while self.finished_at is None and connection.session.queued_body_size(self.stream_id) > SEND_BUFFER_BYTES:
            self.writer = connection.server.loop.create_future()
            connection.writers.add(self)
            await self.writer

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        self._check_unfinished()
        if self.headers_sent:
            raise grpc.aio.UsageError("Send initial metadata failed: already sent")
        self._initial = wire.encode_metadata(initial_metadata)
        self._send_headers()
        self.connection.wake()

    async def abort(self, code: StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """End the call with a status and leave the handler by an exception."""
        if self._aborted:
            raise grpc.aio.UsageError("Abort already called!")
        if code is StatusCode.OK:
            raise AssertionError("Expecting non-ok status code.")
        if trailing_metadata:
            self.set_trailing_metadata(trailing_metadata)
        self._aborted = True
        self.end(code, details or self._details)
        raise grpc.aio.AbortError("Locally aborted.")

    async def abort_with_status(self, status: Any) -> NoReturn:
        await self.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """What goes with the status. Raises ValueError for what cannot be sent."""
        self._trailers = wire.encode_metadata(trailing_metadata)
        self._trailing_metadata = tuple(trailing_metadata)

    def trailing_metadata(self) -> Any:
        return self._trailing_metadata

    def invocation_metadata(self) -> Any:
        """What came with the call. Raises CallError for binary metadata that is not base64."""
        if self._metadata is None:
            self._metadata = wire.decode_metadata(self._headers)
        return self._metadata

    def set_code(self, code: StatusCode | int) -> None:
        self._code = CODES[code] if isinstance(code, int) else code

    def code(self) -> Any:
        return self._code

    def set_details(self, details: str) -> None:
        self._details = details

    def details(self) -> Any:
        return self._details

    def set_compression(self, compression: Compression) -> None:
        """Compress what follows, if the client accepts that ("Compression": grpc-accept-encoding)."""
        if self.headers_sent:
            raise RuntimeError("Compression setting must be specified before sending initial metadata")
        accepted = self.fields.get(b"grpc-accept-encoding", b"").replace(b" ", b"").split(b",")
        encoding = wire.ENCODINGS.get(Compression(compression))
        self._response_encoding = encoding if encoding in accepted else None

    def disable_next_message_compression(self) -> None:
        self._compress_next = False

    def peer(self) -> str:
        return self.connection.peer

    def auth_context(self) -> Any:
        return self.connection.auth_context

    def peer_identity_key(self) -> Any:
        keys = ("x509_subject_alternative_name", "x509_common_name")
        return next((key for key in keys if key in self.connection.auth_context), None)

    def peer_identities(self) -> Any:
        return self.connection.auth_context.get(self.peer_identity_key())

    def time_remaining(self) -> float | None:  # type: ignore[override]  # None without a deadline
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def cancelled(self) -> bool:
        return self.client_gone

    def done(self) -> bool:
        return self.finished_at is not None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` with this context once the handler has ended."""
        if self.task:
            self.task.add_done_callback(lambda _: callback(self))
