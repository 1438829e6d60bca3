"""One call: the context that its handler gets, and the order of things from the first header to the status.

    HEADERS -> task begins: interceptors, handler -> request messages as DATA comes -> handler -> HEADERS, DATA, trailers with the status

A call ends once, by whatever comes first: the handler's answer, its error, `abort`, the deadline, the client's RST_STREAM, or the
server's stop. What comes after that changes nothing.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import ngh2
from grpc import Compression, StatusCode

from tercet.server.transport.wire import (
    ACCEPTED,
    ENCODINGS,
    PREFIX,
    WINDOW_BITS,
    CallError,
    Headers,
    Metadatum,
    decode_metadata,
    decode_timeout,
    decompress,
    encode_message,
    encode_metadata,
    status_headers,
)

if TYPE_CHECKING:
    from tercet.server.transport.connection import Connection

log = logging.getLogger(__name__)

RESPONSE: Headers = ((b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-accept-encoding", ACCEPTED))
OK: Headers = ((b"grpc-status", b"0"),)
CODES = {code.value[0]: code for code in StatusCode}
SEND_BUFFER_BYTES = 2**16  # of a stream's messages that may wait for the client; then `write` waits


class AbortError(grpc.aio.AbortError):
    """Leaves a handler whose call has ended; not logged."""


class Call(grpc.aio.ServicerContext[Any, Any]):
    """A call of a client. Handlers use what grpc.aio.ServicerContext has; the rest is for Connection."""

    # How a call begins; most never change most of these.
    handler: Any = None
    encoding = b""  # of the request's messages
    response_encoding: bytes | None = None
    compress_next = True
    deadline: float | None = None  # of time.monotonic
    timer: asyncio.TimerHandle | None = None
    half_closed = False  # the client has sent all that it sends
    headers_sent = False
    finished_at: float | None = None  # time.monotonic; the status was sent, or nobody waits for it
    client_gone = False
    _initial: Headers = ()
    _trailers: Headers = ()
    _trailing_metadata: Any = ()
    _code: StatusCode | None = None
    _details = ""
    _aborted = False
    _metadata: tuple[Metadatum, ...] | None = None
    path = b""
    task: asyncio.Task[None] | None = None
    _reader: asyncio.Future[None] | None = None  # waits for a message
    writer: asyncio.Future[None] | None = None  # waits for room

    def __init__(self, connection: "Connection", stream_id: int, headers: Headers) -> None:
        self.connection, self.stream_id, self._headers = connection, stream_id, headers
        self.fields: Mapping[bytes, bytes] = dict(headers)
        self._buffer: bytes | bytearray = b""  # of a message that is not complete
        self._messages: deque[bytes] = deque()
        self._unacknowledged = 0  # bytes that the client's window does not have back

    def start(self) -> None:
        """Look at the headers and begin. Raises CallError."""
        headers = self.fields
        self.path = headers.get(b":path", b"")
        if timeout := headers.get(b"grpc-timeout"):
            self._set_deadline(decode_timeout(timeout))
        self.encoding = headers.get(b"grpc-encoding", b"")
        if self.encoding and self.encoding != b"identity" and self.encoding not in WINDOW_BITS:
            encoding = self.encoding[:20].decode(errors="replace")
            raise CallError(StatusCode.UNIMPLEMENTED, f"grpc-encoding: expected one of {ACCEPTED.decode()}, got {encoding!r}")
        if compression := self.connection.server.compression:
            self.set_compression(compression)
        self.task = self.connection.server.loop.create_task(self._run())

    def _set_deadline(self, seconds: float) -> None:
        if not seconds:
            raise CallError(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        self.deadline = time.monotonic() + seconds
        self.timer = self.connection.server.loop.call_later(min(seconds, 1e6), self.expire)

    # What the client sends.

    def receive(self, data: bytes, end_stream: bool) -> None:
        """Take the content of a DATA frame."""
        self._unacknowledged += len(data)
        self.half_closed = self.half_closed or end_stream
        if self.finished_at is not None:
            self.acknowledge()
            return
        try:
            self._split(data)
            if end_stream and self._buffer:
                raise CallError(StatusCode.INVALID_ARGUMENT, "the request ends in the middle of a message")
        except CallError as error:
            self.end(error.code, str(error))
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
        while len(content) - start >= PREFIX.size:
            compressed, size = PREFIX.unpack_from(content, start)
            if size > limit:
                raise CallError(StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max ({size} vs. {limit})")
            begin, end = start + PREFIX.size, start + PREFIX.size + size
            if len(content) < end:
                break
            message = bytes(content[begin:end])
            self._messages.append(decompress(message, self.encoding, limit) if compressed else message)
            start = end
        self._buffer = b"" if start == len(content) else bytearray(content[start:]) if start or content is data else content

    def acknowledge(self) -> None:
        """Give the client's flow-control windows back what has been taken."""
        if self._unacknowledged:
            self.connection.acknowledge(self._unacknowledged, self.stream_id)
            self._unacknowledged = 0

    def closed(self) -> None:
        """The stream is closed: all is done, or the client has reset it."""
        self.acknowledge()
        if self.finished_at is None:
            self.client_gone = True
            self._code = StatusCode.CANCELLED
            self._finish()
            self.cancel()

    async def _next(self) -> bytes | None:
        """The next message as bytes; None after the last."""
        while not self._messages:
            if self.half_closed:
                return None
            self._reader = self.connection.server.loop.create_future()
            await self._reader
        message = self._messages.popleft()
        if not self._messages:
            self.acknowledge()
        return message

    async def _only_message(self) -> bytes:
        """The one message of a call whose request is not a stream. Raises CallError ("Status codes": UNIMPLEMENTED)."""
        message = await self._next()
        if message is None:
            raise CallError(StatusCode.UNIMPLEMENTED, "expected one request message, got none")
        if not (self.half_closed and not self._messages) and await self._next() is not None:
            raise CallError(StatusCode.UNIMPLEMENTED, "expected one request message, got more")
        return message

    async def _request_iterator(self) -> AsyncIterator[Any]:
        while (request := await self.read()) is not grpc.aio.EOF:
            yield request

    # From the handler to the client.

    async def _run(self) -> None:
        """Find the handler and answer with what it returns or raises, as grpc.aio does."""
        try:
            self.handler = handler = await self.connection.server.find_handler(self)
            if handler is None:
                raise CallError(StatusCode.UNIMPLEMENTED, "Method not found!")
            if handler.request_streaming:
                request = self._request_iterator()
            else:
                request = await self._only_message()
                if handler.request_deserializer:
                    request = handler.request_deserializer(request)
            if handler.response_streaming:
                await self._stream((handler.stream_stream or handler.unary_stream)(request, self))
            else:
                response = await (handler.stream_unary or handler.unary_unary)(request, self)
                self._answer(response)
        except CallError as error:
            self.end(error.code, str(error))
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            self.end(StatusCode.CANCELLED, "the handler was cancelled")
        except Exception as error:
            if self.finished_at is None:
                log.exception("Unexpected [%s] raised by servicer method [%s]", type(error).__name__, self.path.decode(errors="replace"))
                self.end(self._code or StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}")

    async def _stream(self, responses: Any) -> None:
        """Send what a handler yields, or let it call `write` itself."""
        if hasattr(responses, "__aiter__"):
            async with aclosing(responses):
                async for response in responses:
                    await self.write(response)
        else:
            await responses
        self.end(self._code or StatusCode.OK, self._details)

    def _answer(self, response: Any) -> None:
        """Send the only message of a response and the status."""
        if self.finished_at is not None:
            return
        if self._code is not None and self._code is not StatusCode.OK:  # what it returned is of no interest then
            self.end(self._code, self._details)
            return
        message = self._encode(response)
        session, stream_id = self.connection.session, self.stream_id
        try:
            if not self.headers_sent:
                session.send_response(stream_id, self._response_headers())
            session.send_data(stream_id, message)
            session.send_trailers(stream_id, status_headers(StatusCode.OK, self._details) + self._trailers if self._details or self._trailers else OK)
        except ngh2.NGH2Error as error:  # the stream or the connection has just been closed
            log.debug("%s: %s", self.path, error)
        self._finish()

    def _encode(self, response: Any) -> bytes:
        handler = self.handler
        message = handler.response_serializer(response) if handler.response_serializer else response
        encoding = self.response_encoding if self.compress_next else None
        self.compress_next = True
        return encode_message(message, encoding)

    def _response_headers(self) -> Headers:
        self.headers_sent = True
        if self.response_encoding:
            return (*RESPONSE, (b"grpc-encoding", self.response_encoding), *self._initial)
        return RESPONSE + self._initial if self._initial else RESPONSE

    def end(self, code: StatusCode, details: str = "") -> None:
        """End with a status, unless the call has ended already."""
        if self.finished_at is not None:
            return
        self._code, self._details = code, details
        trailers = status_headers(code, details) + self._trailers
        session = self.connection.session
        try:
            if self.headers_sent:
                session.send_trailers(self.stream_id, trailers)
            elif code is StatusCode.OK:
                session.send_response(self.stream_id, self._response_headers())
                session.send_trailers(self.stream_id, trailers)
            else:  # "Trailers-Only"
                session.send_response(self.stream_id, RESPONSE + self._initial + trailers, end_stream=True)
        except ngh2.NGH2Error as error:
            log.debug("%s: %s", self.path, error)
        self._finish()

    def _finish(self) -> None:
        """The call has ended: let go of all that waits for it. Its stream may stay open until the client has taken everything."""
        self.finished_at = time.monotonic()
        self._messages.clear()
        self._buffer = b""
        self.acknowledge()
        if self.timer:
            self.timer.cancel()
        if self.writer and not self.writer.done():
            self.writer.set_result(None)
        self.connection.call_finished()

    def refuse(self, http_status: bytes) -> None:
        """End a request that is not gRPC."""
        self.connection.session.send_response(self.stream_id, ((b":status", http_status),), end_stream=True)
        self._finish()

    def expire(self) -> None:
        """The deadline has passed."""
        self.end(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        self.cancel()

    def cancel(self) -> None:
        """Stop the handler of a call that has ended."""
        if self.task and not self.task.done() and self.task is not asyncio.current_task():
            self.task.cancel()

    def _check_unfinished(self) -> None:
        if self._aborted:
            raise AbortError("Locally aborted.")
        if self.client_gone:
            raise asyncio.CancelledError("Cancelled by the client")
        if self.finished_at is not None:
            raise grpc.aio.UsageError("RPC already finished.")

    # grpc.aio.ServicerContext

    async def read(self) -> Any:
        """The next request; grpc.aio.EOF after the last."""
        self._check_unfinished()
        message = await self._next()
        if message is None:
            return grpc.aio.EOF
        return self.handler.request_deserializer(message) if self.handler.request_deserializer else message

    async def write(self, message: Any) -> None:
        """Send a response; waits while the client does not take what was sent before."""
        self._check_unfinished()
        session = self.connection.session
        if not self.headers_sent:
            session.send_response(self.stream_id, self._response_headers())
        session.send_data(self.stream_id, self._encode(message))
        self.connection.sent = True
        self.connection.wake()
        while self.finished_at is None and session.queued_body_size(self.stream_id) > SEND_BUFFER_BYTES:
            self.writer = self.connection.server.loop.create_future()
            self.connection.writers.add(self)
            await self.writer

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Send the response's headers now, with this metadata."""
        self._check_unfinished()
        if self.headers_sent:
            raise grpc.aio.UsageError("Send initial metadata failed: already sent")
        self._initial = encode_metadata(initial_metadata)
        self.connection.session.send_response(self.stream_id, self._response_headers())
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
        raise AbortError("Locally aborted.")

    async def abort_with_status(self, status: Any) -> NoReturn:
        """`abort` with a grpc.Status."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """What goes with the status. Raises ValueError for what cannot be sent."""
        self._trailers = encode_metadata(trailing_metadata)
        self._trailing_metadata = tuple(trailing_metadata)

    def trailing_metadata(self) -> Any:
        """What goes with the status."""
        return self._trailing_metadata

    def invocation_metadata(self) -> Any:
        """What came with the call. Raises CallError for binary metadata that is not base64."""
        if self._metadata is None:
            self._metadata = decode_metadata(self._headers)
        return self._metadata

    def set_code(self, code: StatusCode | int) -> None:  # type: ignore[override]
        """The status to end with, unless the handler raises."""
        self._code = CODES[code] if isinstance(code, int) else code

    def code(self) -> Any:
        """The status so far."""
        return self._code

    def set_details(self, details: str) -> None:
        """The text of the status."""
        self._details = details

    def details(self) -> Any:
        """The text of the status."""
        return self._details

    def set_compression(self, compression: Compression) -> None:
        """Compress what follows, if the client accepts that ("Compression": grpc-accept-encoding)."""
        if self.headers_sent:
            raise RuntimeError("Compression setting must be specified before sending initial metadata")
        accepted = self.fields.get(b"grpc-accept-encoding", b"").replace(b" ", b"").split(b",")
        encoding = ENCODINGS.get(Compression(compression))
        self.response_encoding = encoding if encoding in accepted else None

    def disable_next_message_compression(self) -> None:
        """Send the next message as it is."""
        self.compress_next = False

    def peer(self) -> str:
        """Where the call comes from, as gRPC writes it: ipv4:ADDRESS:PORT, ipv6:%5BADDRESS%5D:PORT or unix:PATH."""
        return self.connection.peer

    def peer_identities(self) -> Any:
        """The names in the client's certificate."""
        return self.auth_context().get(self.peer_identity_key()) if self.peer_identity_key() else None

    def peer_identity_key(self) -> Any:
        """The part of auth_context that names the client."""
        keys = ("x509_subject_alternative_name", "x509_common_name")
        return next((key for key in keys if key in self.auth_context()), None)

    def auth_context(self) -> Any:
        """What TLS knows of the client: lists of bytes."""
        return self.connection.auth_context

    def time_remaining(self) -> float | None:  # type: ignore[override]
        """Seconds until the deadline; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def cancelled(self) -> bool:
        """Whether the client has cancelled the call or gone away."""
        return self.client_gone

    def done(self) -> bool:
        """Whether the call has ended."""
        return self.finished_at is not None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` with this context once the handler has ended."""
        if self.task:
            self.task.add_done_callback(lambda _: callback(self))
