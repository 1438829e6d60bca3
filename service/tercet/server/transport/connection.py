"""One client: HTTP/2, flow control, keepalive, and protection against abuse.

What protects whom:

    abuse                                  stopped by
    RST_STREAM flood ("rapid reset")       nghttp2, `stream_reset_rate_limit`: GOAWAY; a reset call's task is cancelled at once
    streams that the server must reset     nghttp2, `glitch_rate_limit`: GOAWAY ("made you reset")
    CONTINUATION flood                     nghttp2, `max_continuations`
    SETTINGS or PING flood, unread acks    nghttp2, `max_outbound_ack` and `max_settings`; pings also by strikes, below
    HPACK bomb                             ngh2, `max_inbound_header_list_size` and `max_inbound_header_count`, while decoding
    too many calls at a time               nghttp2, SETTINGS_MAX_CONCURRENT_STREAMS
    a window that never opens              here: `write` waits, and `Limits.send_seconds` resets answers that are not taken
    slow or half frames and headers        here: a PING that cannot be acknowledged in the middle of them
    silent or half-open connections        here: `Limits.handshake_seconds`, keepalive
    frequent pings                         here: strikes, GOAWAY ENHANCE_YOUR_CALM "too_many_pings"
"""

import asyncio
import logging
import random
import ssl
import time
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import ngh2
from grpc import StatusCode
from ngh2 import DataReceived, ErrorCode, PingAcknowledged, PingReceived, RequestReceived, Setting, SettingsReceived, StreamClosed

from tercet.server.transport.call import SEND_BUFFER_BYTES, Call
from tercet.server.transport.wire import CallError

if TYPE_CHECKING:
    from tercet.server.transport.server import Server

log = logging.getLogger(__name__)

STREAM_WINDOW_BYTES, CONNECTION_WINDOW_BYTES = 2**20, 2**24  # what a client may send before a handler reads
DRAIN_SECONDS = 1.0  # for the client to acknowledge that it knows of the end
LINGER_SECONDS = 0.5  # for the client to read the end and close: a socket that is closed with unread input loses output
CLIENT_IDLE_PING_SECONDS = 7200.0  # between pings of a client without calls, where it may not ping more often
KEEPALIVE_PING, DRAIN_PING = b"tercet-k", b"tercet-d"
HTTP1_ANSWER = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 46\r\n\r\n"
    b"This is a gRPC server; it speaks HTTP/2 only.\n"
)
GRPC = b"application/grpc"


class Connection(asyncio.Protocol):
    """The server's end of one connection."""

    transport: asyncio.Transport
    waking = False  # a flush will come in this tick or the next
    paused = False  # the socket takes no more
    settings_received = False
    draining = False  # the client has been told to make new calls elsewhere
    drained = False  # and calls that it made before it knew have come
    closing = False
    partial = False  # the last bytes did not complete a frame
    pinged_at: float | None = None
    last_ping_at = 0.0
    strikes = 0
    last_stream_id = 0
    sent = True  # something of a call, since the client's last ping

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.calls: dict[int, Call] = {}  # whose streams are open
        self.writers: set[Call] = set()  # that wait for room
        self.created_at = self.heard_at = self.used_at = time.monotonic()
        self.age_seconds = server.limits.age_seconds * random.uniform(0.9, 1.1)  # noqa: S311  as gRPC does: not all at once
        self.session = ngh2.Connection(ngh2.Role.SERVER, server.session_configuration)
        self.initiated = False  # the first bytes have come, and our SETTINGS go out

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if (tls is not None and tls.selected_alpn_protocol() != "h2") or self.server.stopping:
            self.transport.abort()
            return
        self.server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.closing = True
        self.server.connections.discard(self)
        self._close_calls()

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        try:
            if not self.initiated:
                self._initiate()
            self.session.receive_data(data)
            if events := self.session.events():
                self.heard_at, self.partial = time.monotonic(), False
                self._handle(events)
            else:
                self.partial = True
        except ngh2.NGH2Error as error:
            self._fail(error, data)
            return
        if not self.waking:
            self.flush()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.flush()

    # In.

    def _initiate(self) -> None:
        """Send SETTINGS, once the client has spoken (RFC 9113, 3.4), so that HTTP/1 can be answered in HTTP/1."""
        self.initiated = True
        limits = self.server.limits
        settings = {Setting.MAX_CONCURRENT_STREAMS: limits.concurrent_streams, Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES}
        self.session.initiate_connection({**settings, Setting.MAX_HEADER_LIST_SIZE: limits.metadata_bytes})
        self.session.set_local_window_size(CONNECTION_WINDOW_BYTES)

    def _handle(self, events: list[ngh2.Event]) -> None:
        calls = self.calls
        for event in events:
            kind = event.__class__
            if kind is RequestReceived:
                self._begin(event)  # type: ignore[arg-type]
            elif kind is DataReceived:
                if call := calls.get(event.stream_id):  # type: ignore[attr-defined]
                    call.receive(event.data, end_stream=event.end_stream)  # type: ignore[attr-defined]
            elif kind is StreamClosed:
                if call := calls.pop(event.stream_id, None):  # type: ignore[attr-defined]
                    call.closed()
            elif kind is ngh2.TrailersReceived:
                if call := calls.get(event.stream_id):  # type: ignore[attr-defined]
                    call.receive(b"", end_stream=True)
            else:
                self._handle_rare(event)
                if self.closing:
                    return

    def _handle_rare(self, event: ngh2.Event) -> None:
        """What concerns the connection and not a call."""
        match event:
            case SettingsReceived():
                self.settings_received = True
            case PingReceived():
                self._check_ping()
            case PingAcknowledged(opaque_data=data):
                if data == DRAIN_PING:
                    self._finish_drain()
                elif data == KEEPALIVE_PING:
                    self.pinged_at = None
            case ngh2.ConnectionClosed():  # one side has sent GOAWAY, and all calls have ended
                self.transport.write(self.session.data_to_send())
                self._close()

    def _begin(self, event: RequestReceived) -> None:
        """A call's headers have come."""
        self.used_at, self.last_stream_id = self.heard_at, event.stream_id
        call = Call(self, event.stream_id, event.headers)
        self.calls[event.stream_id] = call
        self.server.active_calls += 1
        call.half_closed = event.end_stream
        try:
            if status := http_status(call.fields):
                call.refuse(status)
            else:
                self.server.check_call(event.headers)
                call.start()
        except CallError as error:
            call.interrupt(error.code, str(error))

    def acknowledge(self, size: int, stream_id: int) -> None:
        """Let the client send as many bytes more."""
        try:
            self.session.acknowledge_received_data(size, stream_id)
        except ngh2.NGH2Error:  # the connection has ended
            return
        self.wake()

    # Out.

    def wake(self) -> None:
        """Write what is ready, once, after all that is ready to run now has run."""
        if not self.waking:
            self.waking = True
            self.server.loop.call_soon(self.flush)

    def call_finished(self, now: float) -> None:
        """A call has ended."""
        self.sent, self.used_at = True, now
        self.server.active_calls -= 1
        self.wake()

    def flush(self) -> None:
        """Write what nghttp2 has ready and the client's windows allow, unless the socket is full."""
        self.waking = False
        if self.paused or self.closing or not self.initiated:
            return
        try:
            if data := self.session.data_to_send():
                self.transport.write(data)
            if events := self.session.events():
                self._handle(events)
        except ngh2.NGH2Error as error:
            self._fail(error)
            return
        if self.writers:
            self._wake_writers()
        if self.drained and not self.calls:
            self._close()

    def _wake_writers(self) -> None:
        for call in list(self.writers):
            if call.finished_at is not None or self.session.queued_body_size(call.stream_id) <= SEND_BUFFER_BYTES:
                self.writers.discard(call)
                if call.writer and not call.writer.done():
                    call.writer.set_result(None)

    # The end.

    def drain(self, reason: bytes = b"") -> None:
        """Let the client make new calls elsewhere, and finish those that it has made (RFC 9113, 6.8).

        The first GOAWAY names no last stream; once the client has answered a PING it knows, and all that it sent before has come.
        Then the second says which stream was the last.
        """
        if self.draining or self.closing:
            return
        self.draining = True
        self.reason = reason
        if not self.initiated:
            self.transport.abort()
            return
        try:
            self.session.send_shutdown_notice()
            self.transport.write(self.session.data_to_send())  # nghttp2 would send the PING first
            self.session.ping(DRAIN_PING)
        except ngh2.NGH2Error as error:
            self._fail(error)
            return
        self.wake()
        self.server.loop.call_later(DRAIN_SECONDS, self._finish_drain)

    def _finish_drain(self) -> None:
        if self.drained or self.closing:
            return
        self.drained = True
        try:
            self.session.send_goaway(ErrorCode.NO_ERROR, debug_data=self.reason)
        except ngh2.NGH2Error as error:
            log.debug("%s: %s", self.peer, error)
        self.wake()

    def end_calls(self, details: str) -> list[asyncio.Task[None]]:
        """End what is in flight as UNAVAILABLE, at the end of a grace period; the tasks that have been cancelled."""
        unfinished = [call for call in self.calls.values() if call.finished_at is None]
        for call in unfinished:
            call.interrupt(StatusCode.UNAVAILABLE, details)
        self._finish_drain()
        self.flush()
        self._close()
        return [call.task for call in unfinished if call.task]

    def _fail(self, error: ngh2.NGH2Error, data: bytes = b"") -> None:
        """The client has broken HTTP/2 in a way that ends nghttp2's session: say so, and close."""
        log.info("%s: %s", self.peer, error)
        if not self.settings_received and b" HTTP/1." in data[:8192]:
            self.transport.write(HTTP1_ANSWER)
        else:
            code = ErrorCode.ENHANCE_YOUR_CALM if isinstance(error, ngh2.DenialOfServiceError) else ErrorCode.PROTOCOL_ERROR
            self.transport.write(goaway(self.last_stream_id, code, str(error)))
        self._close()

    def _close(self) -> None:
        """Send FIN, and close when the client has, or has had time to read what was written."""
        if not self.closing:
            self.closing = True
            self._close_calls()
            if self.transport.can_write_eof():  # not with TLS
                self.transport.write_eof()
            self.server.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _close_calls(self) -> None:
        for call in self.calls.values():
            call.closed()
        self.calls.clear()

    # Manners.

    def _check_ping(self) -> None:
        """Count a ping that comes too early; pings while calls are answered are never too early, as in gRPC."""
        limits, now = self.server.limits, self.heard_at
        patient = self.calls or limits.pings_without_calls
        early = now - self.last_ping_at < (limits.ping_interval_seconds if patient else CLIENT_IDLE_PING_SECONDS)
        self.strikes = 0 if self.sent else self.strikes + early
        self.sent, self.last_ping_at = False, now
        if self.strikes > limits.ping_strikes > 0:
            self.session.send_goaway(ErrorCode.ENHANCE_YOUR_CALM, debug_data=b"too_many_pings")
            self.flush()
            self._close()

    def check(self, now: float) -> None:
        """Look at the clock: called every Limits.check_seconds."""
        if self.closing or self.transport.is_closing():
            return
        limits = self.server.limits
        silent = now - self.heard_at
        patience = min(limits.handshake_seconds, limits.keepalive_seconds) if self.partial else limits.keepalive_seconds
        if not self.settings_received:
            if now - self.created_at > limits.handshake_seconds:
                self.transport.abort()
        elif self.pinged_at is not None and now - self.pinged_at > limits.keepalive_timeout_seconds:
            self.transport.abort()
        elif self.pinged_at is None and silent > patience:
            self._ping(now)
        elif now - self.created_at > self.age_seconds + limits.age_grace_seconds:
            self.end_calls("the connection has reached its maximum age")
        elif now - self.created_at > self.age_seconds:
            self.drain(b"max_age")
        elif not self.calls and now - self.used_at > limits.idle_seconds:
            self.drain(b"connection idle")
        self._reset_lingering(now - limits.send_seconds)

    def _ping(self, now: float) -> None:
        self.pinged_at = now
        self.session.ping(KEEPALIVE_PING)
        self.flush()

    def _reset_lingering(self, before: float) -> None:
        """Close streams whose call ended long ago, but whose client takes no answer or never ends its request."""
        lingering = [call.stream_id for call in self.calls.values() if call.finished_at is not None and call.finished_at < before]
        for stream_id in lingering:
            self.session.reset_stream(stream_id, ErrorCode.CANCEL)
        if lingering:
            self.flush()

    @cached_property
    def peer(self) -> str:
        """Where the client is, as gRPC writes it."""
        address = self.transport.get_extra_info("peername")
        if not isinstance(address, tuple):
            return f"unix:{address.decode() if isinstance(address, bytes) else address or ''}"
        host, port = address[:2]
        if host.startswith("::ffff:") and "." in host:  # IPv4, on a socket for both
            host = host.removeprefix("::ffff:")
        return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"

    @cached_property
    def auth_context(self) -> Mapping[str, list[bytes]]:
        """What TLS knows of the client, with gRPC's keys."""
        tls: ssl.SSLObject | None = self.transport.get_extra_info("ssl_object")
        if tls is None:
            return {"transport_security_type": [b"insecure"], "security_level": [b"TSI_SECURITY_NONE"]}
        context = {"transport_security_type": [b"ssl"], "security_level": [b"TSI_PRIVACY_AND_INTEGRITY"]}
        context["ssl_session_reused"] = [b"true" if tls.session_reused else b"false"]
        context["ssl_tls_version"] = [str(tls.version()).encode()]
        if certificate := tls.getpeercert(binary_form=True):
            context["x509_pem_cert"] = [ssl.DER_cert_to_PEM_cert(certificate).encode()]
            context.update(certificate_names(tls.getpeercert() or {}))
        return context


def http_status(fields: Mapping[bytes, bytes]) -> bytes | None:
    """The HTTP status to refuse a request with that is not gRPC; None if it is."""
    kind = fields.get(b"content-type", b"")
    if kind != GRPC and not kind.startswith((GRPC + b"+", GRPC + b";")):
        return b"415"
    return None if fields.get(b":method") == b"POST" else b"405"


def goaway(last_stream_id: int, code: int, text: str) -> bytes:
    """A GOAWAY frame (RFC 9113, 6.8), for a connection without a session."""
    payload = last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + text.encode()
    return len(payload).to_bytes(3, "big") + b"\x07\x00" + bytes(4) + payload


def certificate_names(certificate: Mapping[str, Any]) -> dict[str, list[bytes]]:
    """The subject and the alternative names of a certificate as ssl describes it, with gRPC's keys."""
    short = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C"}
    subject = list(chain.from_iterable(certificate.get("subject", ())))
    names: dict[str, list[bytes]] = {"x509_subject": [",".join(f"{short.get(k, k)}={v}" for k, v in reversed(subject)).encode()]}
    if common := [value.encode() for key, value in subject if key == "commonName"]:
        names["x509_common_name"] = common
    for kind, value in certificate.get("subjectAltName", ()):
        names.setdefault("x509_subject_alternative_name", []).append(str(value).encode())
        key = {"DNS": "peer_dns", "URI": "peer_uri", "IP Address": "peer_ip", "email": "peer_email"}.get(kind)
        if key:
            names.setdefault(key, []).append(str(value).encode())
    return names
