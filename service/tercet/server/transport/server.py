"""Ports, TLS, handlers, interceptors, and how a server starts and stops."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import ngh2
from grpc import StatusCode

from tercet.server.transport.call import Call
from tercet.server.transport.connection import LINGER_SECONDS, Connection
from tercet.server.transport.limits import Limits
from tercet.server.transport.wire import CallError, Headers, header_bytes

log = logging.getLogger(__name__)

BACKLOG = 1024
RESETS = (10_000, 1_000)  # RST_STREAM at once, and per second; calls cancelled under overload are not an attack
HEADER_BYTES = 2**18  # of headers, decoded: beyond, the connection is closed; from Limits.metadata_bytes on, the call is refused
CANCELLED_SECONDS = 1.0  # that handlers have to clean up after they were cancelled

Contexts = ssl.SSLContext | Callable[[], ssl.SSLContext]


class HandlerCallDetails(NamedTuple):
    """What interceptors get to know of a call."""

    method: str
    invocation_metadata: Any


class Server(grpc.aio.Server):
    """Serves calls; see `server` in the package for its arguments."""

    def __init__(
        self,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        options: Mapping[str, Any],
        maximum_concurrent_rpcs: int | None,
        compression: grpc.Compression | None,
    ) -> None:
        self.limits = Limits.read(options)
        self.session_configuration = ngh2.Configuration(
            auto_window_update=False,
            stream_reset_rate_limit=RESETS,
            max_inbound_header_list_size=max(HEADER_BYTES, self.limits.metadata_bytes),
        )
        self.compression = compression
        self.connections: set[Connection] = set()
        self.active_calls = 0  # that have not ended
        self.stopping = False
        self._interceptors = tuple(interceptors)
        self._max_calls = maximum_concurrent_rpcs
        self._methods: dict[bytes, Any] = {}  # by path
        self._generic: list[grpc.GenericRpcHandler] = []
        self._sockets: list[tuple[socket.socket, Contexts | None]] = []
        self._unix_paths: list[Path] = []
        self._listeners: list[asyncio.Server] = []
        self._checking: asyncio.Task[None] | None = None
        self._terminated = asyncio.Event()

    # grpc.aio.Server

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Add what finds handlers by the details of a call."""
        self._generic += generic_rpc_handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Add the handlers of a service, by the names of its methods."""
        self._methods |= {f"/{service_name}/{name}".encode(): handler for name, handler in method_handlers.items()}

    def add_insecure_port(self, address: str) -> int:
        """Bind HOST:PORT, [IPV6]:PORT or unix:PATH. Returns the port, 1 for a path. Raises RuntimeError."""
        return self._bind(address, None)

    def add_secure_port(self, address: str, server_credentials: Contexts) -> int:  # type: ignore[override]
        """Bind an address for TLS. The context's certificate, its client authorities and whether it demands a certificate hold.

        With a function, each handshake uses the context that it returns then: so certificates are renewed. It must not block.
        """
        return self._bind(address, server_credentials)

    async def start(self) -> None:
        """Accept connections."""
        self.loop = asyncio.get_running_loop()
        for bound, contexts in self._sockets:
            tls: dict[str, Any] = {}
            if contexts is not None:
                tls = {"ssl": handshake_context(contexts), "ssl_handshake_timeout": self.limits.handshake_seconds}
            listen = self.loop.create_unix_server if bound.family == socket.AF_UNIX else self.loop.create_server
            self._listeners.append(await listen(lambda: Connection(self), sock=bound, backlog=BACKLOG, **tls))
        self._checking = self.loop.create_task(self._check())

    async def stop(self, grace: float | None) -> None:
        """Stop accepting, let clients know, give calls `grace` seconds to finish, and end what is left as UNAVAILABLE."""
        if self.stopping:
            await self._terminated.wait()
            return
        self.stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.drain()
        await self._closed(grace or 0)
        cancelled = [task for connection in list(self.connections) for task in connection.end_calls("the server is stopping")]
        if cancelled:
            await asyncio.wait(cancelled, timeout=CANCELLED_SECONDS)
        await self._closed(2 * LINGER_SECONDS)
        for connection in list(self.connections):
            connection.transport.abort()
        if self._checking:
            self._checking.cancel()
        for bound, _ in self._sockets:
            bound.close()
        for path in self._unix_paths:
            path.unlink(missing_ok=True)
        self._terminated.set()

    async def wait_for_termination(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109  grpc.aio's own
        """Wait until the server has stopped; whether it has not after `timeout` seconds."""
        try:
            await asyncio.wait_for(self._terminated.wait(), timeout)
        except TimeoutError:
            return True
        return False

    # For connections and calls.

    def check_call(self, headers: Headers) -> None:
        """Raise CallError when a call has too much metadata, or when there are too many calls."""
        size, limit = header_bytes(headers), self.limits.metadata_bytes
        if size > limit:
            raise CallError(StatusCode.RESOURCE_EXHAUSTED, f"the metadata of a call may take {limit} bytes, got {size}")
        if self._max_calls is not None and self.active_calls > self._max_calls:
            raise CallError(StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")

    def registered_handler(self, path: bytes) -> Any:
        """The handler of a method, if it can be found without interceptors and generic handlers."""
        return None if self._interceptors else self._methods.get(path)

    async def find_handler(self, call: Call) -> Any:
        """What the interceptors make of the method's handler; None: there is none."""
        return await self._intercept(0, HandlerCallDetails(call.path.decode(errors="replace"), call.invocation_metadata()))

    async def _intercept(self, index: int, details: Any) -> Any:
        """Ask the interceptors from `index` on, each of which may ask the next."""
        if index == len(self._interceptors):
            return self._methods.get(details.method.encode()) or self._find_generic(details)

        def next_interceptor(details: Any) -> Awaitable[Any]:
            return self._intercept(index + 1, details)

        return await self._interceptors[index].intercept_service(next_interceptor, details)

    def _find_generic(self, details: Any) -> Any:
        return next((handler for generic in self._generic if (handler := generic.service(details))), None)

    # Ports.

    def _bind(self, address: str, contexts: Contexts | None) -> int:
        try:
            unix = address.startswith(("unix:", "unix-abstract:"))
            bound = bind_unix(address) if unix else bind_tcp(address, reuse_port=bool(self.limits.reuse_port))
        except (OSError, ValueError) as error:
            raise RuntimeError(f"Failed to bind to address {address}: {error}") from error
        self._sockets.append((bound, contexts))
        if bound.family == socket.AF_UNIX and isinstance(path := bound.getsockname(), str):
            self._unix_paths.append(Path(path))
        return 1 if bound.family == socket.AF_UNIX else int(bound.getsockname()[1])

    # Time.

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(self.limits.check_seconds)
            now = time.monotonic()
            for connection in list(self.connections):
                try:
                    connection.check(now)
                except Exception:  # one connection's trouble is not the others'
                    log.exception("%s", connection.peer)
                    connection.transport.abort()

    async def _closed(self, seconds: float) -> None:
        """Wait until all connections are closed, but no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.connections:  # noqa: ASYNC110  not worth an event: a server stops once
                    await asyncio.sleep(0.01)


def bind_tcp(address: str, *, reuse_port: bool) -> socket.socket:
    """A socket for HOST:PORT. Raises OSError, ValueError."""
    for scheme in ("ipv4:", "ipv6:", "dns:///", "dns:"):
        address = address.removeprefix(scheme)
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "::"
    family, kind, protocol, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))  # [::] takes IPv4 as well
        bound.bind(where)
    except OSError:
        bound.close()
        raise
    return bound


def bind_unix(address: str) -> socket.socket:
    """A socket for unix:PATH, unix:///PATH or unix-abstract:NAME; one that a dead server left is replaced. Raises OSError."""
    scheme, _, path = address.partition(":")
    path = f"\0{path}" if scheme == "unix-abstract" else path.removeprefix("//")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if scheme == "unix":
                Path(path).unlink()
        except OSError:
            pass
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(path)
    except OSError:
        bound.close()
        raise
    return bound


def handshake_context(contexts: Contexts) -> ssl.SSLContext:
    """The context that a port is opened with, and whose handshakes go on with what `contexts` returns then."""
    current = contexts() if callable(contexts) else contexts
    http2_only(current)
    if not callable(contexts):
        return current
    latest = current

    def renew(connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal latest
        if (now := contexts()) is not latest:
            http2_only(now)
            latest = now
        connection.context = latest

    current.sni_callback = renew  # OpenSSL calls it in each handshake, with or without a name
    return current


def http2_only(context: ssl.SSLContext) -> None:
    """ALPN h2, TLS 1.2 or later (RFC 9113, 9.2), and no resumption: each connection is checked against the files of now."""
    context.set_alpn_protocols(["h2"])
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
