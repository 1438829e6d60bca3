"""gRPC over HTTP/2 on asyncio, with nghttp2 (the package ngh2) doing HTTP/2: stands in for grpc.aio.server.

    socket --bytes--> Connection --ngh2--> events --> Call --> handler: the same servicers as with grpc.aio
    socket <--one write per loop tick-- Connection <--ngh2-- headers, messages, trailers <-- Call

grpc.aio needs a thread, a lock and several loop ticks for each call; here a call is one task. (Running a handler up to its first
wait without a task was tried: it costs less for an echo, and more for calls that wait in the batcher.) `server` takes the
arguments of grpc.aio.server. Servicers, interceptors, health and reflection cannot tell the difference. Only ports with TLS do:
they take an ssl.SSLContext (see `Server.add_secure_port`).

The standards: RFC 9113 (HTTP/2), RFC 7541 (HPACK), and gRPC's own "gRPC over HTTP2" (PROTOCOL-HTTP2.md), "Compression" and "Status
codes" in the folder doc of github.com/grpc/grpc.

    wire.py        bytes: metadata, grpc-timeout, grpc-message, compression
    limits.py      what a connection may do, read from gRPC's own option names
    call.py        one call: the context that its handler gets
    connection.py  one client: HTTP/2, flow control, keepalive, abuse
    server.py      ports, TLS, handlers, interceptors, start and stop
"""

from collections.abc import Sequence
from typing import Any

import grpc

from tercet.server.transport.server import Server

__all__ = ["Server", "server"]


def server(
    migration_thread_pool: None = None,  # noqa: ARG001  handlers are coroutines: none needs a thread
    handlers: Sequence[grpc.GenericRpcHandler] | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] | None = None,
    options: Sequence[tuple[str, Any]] | None = None,
    maximum_concurrent_rpcs: int | None = None,
    compression: grpc.Compression | None = None,
) -> Server:
    """A server with the arguments of grpc.aio.server. Options that limits.py does not name are ignored, as gRPC does."""
    new = Server(interceptors or (), dict(options or ()), maximum_concurrent_rpcs, compression)
    new.add_generic_rpc_handlers(handlers or ())
    return new
