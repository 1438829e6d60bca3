"""The server: all services on one port, with health, reflection and a graceful shutdown."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from tercet.errors import StartupError
from tercet.proto import POOL
from tercet.server.config import MAX_INT, Config
from tercet.server.repository import Repository
from tercet.server.rpc import RpcServer
from tercet.server.security import BearerTokens, reserve_port, tls_credentials, tls_files
from tercet.server.servicers import SERVICES
from tercet.server.telemetry import MetricMemory, Telemetry, start_metrics_server

log = logging.getLogger(__name__)

# gRPC reads this when the first server is created. Without the listener's own threads a Python server needs less CPU time per call
# (benchmarks/README.md).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

CONNECTION_OPTIONS = {  # times in ms
    "grpc.server_handshake_timeout_ms": 10_000,  # drop connections that do not finish the handshake; gRPC's default is 120 s
    "grpc.max_connection_idle_ms": 3_600_000,  # close a connection without calls; the client reopens it for its next call
    "grpc.keepalive_time_ms": 60_000,  # detect dead peers; gRPC's default is 2 h
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,  # clients behind load balancers ping idle connections
    "grpc.http2.min_recv_ping_interval_without_data_ms": 9_000,  # gRPC lets a client ping every 10 s; the default here is 5 min
    "grpc.http2.max_ping_strikes": 2,  # then the connection is closed: ENHANCE_YOUR_CALM, too_many_pings
    "grpc.http.overload_protection": 0,  # it counts calls that have just ended, and makes most UNAVAILABLE when many are in flight
    "grpc.server.max_pending_requests": 100_000,  # gRPC's 1,000 ends calls as CANCELLED; our queues say RESOURCE_EXHAUSTED
    "grpc.server.max_pending_requests_hard_limit": 100_000,
}
DRAIN_POLL_SECONDS, DRAIN_MAX_POLLS = 0.1, 5  # each step of the shutdown waits for a period without new calls


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # it has no types
    """The standard health service, except that watchers do not delay the shutdown."""

    def __init__(self) -> None:
        super().__init__()
        self.watches: WeakSet[asyncio.Future[None]] = WeakSet()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        watch = asyncio.ensure_future(super().Watch(request, context))
        self.watches.add(watch)
        with suppress(asyncio.CancelledError):
            await watch
        return
        yield  # type: ignore[unreachable]  # it makes this a generator; the base class has written the responses


class Server:
    """A gRPC server bound to a port."""

    def __init__(
        self, config: Config, *, memory: MetricMemory | None = None, relay: Callable[[str], None] = lambda _: None
    ) -> None:
        """Load the models, add all services and bind the port. Needs a running event loop.

        The metrics are counted in `memory`. `relay` is called with `load NAME` or `unload NAME` after a client's request, for other
        processes to do the same. Raises StartupError when a model cannot be loaded or the port is taken.
        """
        self._tracing = _start_tracing(config.trace_endpoint) if config.trace_endpoint else None
        interceptors: list[grpc.aio.ServerInterceptor] = [self._tracing.interceptor] if self._tracing else []
        interceptors += [BearerTokens(config.token_file)] if config.token_file else []
        self.telemetry, self._health = Telemetry(memory), Health()
        self.repository = Repository(config, self.telemetry, self._tracing.record_batch if self._tracing else None)
        self._relay = relay
        self.stopping = asyncio.Event()
        if config.workers == 1:  # with several, the parent has reserved it
            reserve_port(config).close()  # gRPC's own error names no cause, and goes to stderr
        self._server, port = _bind(config, interceptors)
        self.config = replace(config, port=port)
        self.rpc = RpcServer(self._server, self.telemetry)
        self._add_services()

    def _add_services(self) -> None:
        for add_to_server, servicer in SERVICES.items():
            add_to_server(servicer(self.repository, self.telemetry, self.command), self.rpc)
        uncounted = RpcServer(self._server, Telemetry())  # health checks are answered while the server drains, too
        health_pb2_grpc.add_HealthServicer_to_server(self._health, uncounted)
        for module in (health_pb2, reflection_pb2):
            POOL.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        names = [*self.rpc.services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server, pool=POOL)

    async def start(self) -> None:
        """Accept calls, and report to health checks which models are served."""
        gc.freeze()  # what is loaded now stays: the collector need not traverse it
        await self._server.start()
        await self._publish_health()
        self._watching = asyncio.create_task(self._watch())

    async def command(self, line: str, *, relayed: bool = False) -> None:
        """Run `load NAME` or `unload NAME`. Raises the errors of Repository.load and unload."""
        verb, _, name = line.partition(" ")
        await (self.repository.load(name) if verb == "load" else self.repository.unload(name))
        await self._publish_health()
        if not relayed:
            self._relay(line)

    async def reload_changed(self, *, wait_until_stable: bool = True) -> None:
        """Reload models whose files have changed; see Repository.reload_changed."""
        await self.repository.reload_changed(wait_until_stable=wait_until_stable)
        await self._publish_health()

    async def _watch(self) -> None:
        while self.config.watch:
            await asyncio.sleep(self.config.watch)
            await self.reload_changed()

    async def _publish_health(self) -> None:
        for name in self.repository.all_names():
            await self.set_health(name, serving=name in self.repository.loaded_names())

    async def set_health(self, name: str, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.ServingStatus
        await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stopping`; SIGHUP reloads models at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_now)
        await self.stopping.wait()
        log.info("shutting down: requests in flight have %g s to finish", self.config.grace)
        await self.stop()

    def _reload_now(self) -> None:
        self._reloading = asyncio.create_task(self.reload_changed(wait_until_stable=False))

    async def stop(self) -> None:
        """Report NOT_SERVING, then refuse new calls, then let calls in flight finish within the grace period.

        gRPC would end calls that it has read but not yet handed over as CANCELLED, which clients do not retry. So new calls are
        first refused as UNAVAILABLE, until none arrive any more.
        """
        self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        await self._wait_for_quiet()
        self.rpc.draining = True
        await self._wait_for_quiet()
        for watch in self._health.watches:
            watch.cancel()
        await self._server.stop(self.config.grace)
        await self.repository.close()
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)

    async def _wait_for_quiet(self) -> None:
        """Wait until no calls arrive, for a limited time."""
        for _ in range(DRAIN_MAX_POLLS):
            received = self.rpc.received
            await asyncio.sleep(DRAIN_POLL_SECONDS)
            if self.rpc.received == received:
                return


def _start_tracing(endpoint: str) -> Any:
    try:
        from tercet.server.tracing import Tracing  # noqa: PLC0415  needs the extra `trace`
    except ImportError as error:
        raise StartupError(f"--trace-endpoint needs more packages: pip install '.[trace]' ({error})") from error
    return Tracing(endpoint)


def _bind(config: Config, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> tuple[grpc.aio.Server, int]:
    """A server of the transport that was chosen, and its port. Raises StartupError."""
    options = list(_grpc_options(config).items())
    if config.transport == "grpcio" or (config.transport == "auto" and not find_spec("ngh2")):
        server = grpc.aio.server(interceptors=interceptors, options=options)
        return server, server.add_secure_port(config.address, tls_credentials(config))
    try:
        from tercet.server import transport  # noqa: PLC0415  needs ngh2
    except ImportError as error:
        raise StartupError(f"--transport nghttp2 needs more packages: pip install '.[serve]' ({error})") from error
    http2 = transport.server(interceptors=interceptors, options=options)
    if files := tls_files(config):
        return http2, http2.add_secure_port(config.address, lambda: (files.refresh() or files.value).context)
    return http2, http2.add_insecure_port(config.address)


def _grpc_options(config: Config) -> dict[str, int]:
    return {
        "grpc.so_reuseport": int(config.workers > 1),
        "grpc.max_receive_message_length": config.max_message_bytes,
        "grpc.max_concurrent_streams": config.max_concurrent_streams,
        "grpc.max_connection_age_ms": int(config.max_connection_age * 1e3) or MAX_INT,  # the largest means never
        "grpc.max_connection_age_grace_ms": int(config.grace * 1e3),
        **CONNECTION_OPTIONS,
    }


async def serve(config: Config, ready: Callable[[Config, Mapping[str, str]], None]) -> None:
    """Serve until SIGTERM or SIGINT. Once calls are accepted, `ready` gets the config with the actual ports, and the engines."""
    server = Server(config)
    server.config = start_metrics_server(server.config, [server.telemetry.memory])
    await server.start()
    ready(server.config, server.repository.engines())
    await server.run()
