"""The server: all faces on one port, health and reflection, and a clean end."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from tercet.errors import InvalidInputError, StartupError
from tercet.proto import POOL
from tercet.server import port
from tercet.server.config import INT, Config
from tercet.server.credentials import BearerToken, tls
from tercet.server.metrics import Metrics, Prometheus, tell
from tercet.server.repository import Repository
from tercet.server.rpc import Calls, TolerantServer, abort_call, check_parsed
from tercet.server.servicers import SERVICES, Backend
from tercet.server.telemetry import Telemetry

if TYPE_CHECKING:
    from tercet.server.tracing import Tracing

log = logging.getLogger(__name__)

# gRPC reads these when the first server is made. A Python server needs a fifth less CPU time a call without the listener's own
# threads (benchmarks/README.md).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

CONNECTION = {  # what nobody needs to set; times in ms
    "grpc.server_handshake_timeout_ms": 10_000,  # who connects and says nothing is let go; 120 s in gRPC
    "grpc.max_connection_idle_ms": 3_600_000,  # a client without a call for so long connects anew when it has one
    "grpc.keepalive_time_ms": 60_000,  # a peer that is gone is noticed; 2 h in gRPC
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,  # clients behind balancers ping idle connections
    "grpc.http2.min_recv_ping_interval_without_data_ms": 9_000,  # the least that gRPC lets a client choose is 10 s; 5 min in gRPC
    "grpc.http.overload_protection": 0,  # it counts calls that have just ended: with many in flight most would be UNAVAILABLE
    "grpc.server.max_pending_requests": 100_000,  # gRPC's 1,000 ends calls with CANCELLED; our queues say RESOURCE_EXHAUSTED
    "grpc.server.max_pending_requests_hard_limit": 100_000,
    "grpc.http2.max_ping_strikes": 2,  # who pings more often than that is sent away: ENHANCE_YOUR_CALM, too_many_pings
}
SETTLE = 0.1, 5  # seconds without a new call, and how often at most that is waited for, before each step of the end

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_NAMES = (*(service.name for service in SERVICES), health.SERVICE_NAME, reflection.SERVICE_NAME)


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # it comes without types
    """The standard health service, whose watchers do not hold up the end."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Report what is now."""
        await self._refuse_unreadable(request, context)
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Report changes until the service ends."""
        await self._refuse_unreadable(request, context)
        watching = asyncio.ensure_future(super().Watch(request, context))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({watching, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            ended.cancel()

    async def _refuse_unreadable(self, request: Any, context: Any) -> None:
        """End a call whose request could not be read."""
        try:
            check_parsed(request)
        except InvalidInputError as error:
            await abort_call(context, error)

    async def end(self) -> None:
        """Say NOT_SERVING to everyone, and let the watchers go."""
        await self.enter_graceful_shutdown()
        self._ended.set()


class Server:
    """A gRPC server bound to a port."""

    def __init__(self, config: Config, relay: Callable[[str], None] = lambda _: None) -> None:
        """Load the models, build all faces and bind the port; call it in a running event loop.

        `relay` gets `load NAME` or `unload NAME` when a client asked for it and it was done, for other processes to do the same.
        Raises StartupError when a model cannot be loaded or the port is taken.
        """
        self._tracing = start_tracing(config)
        interceptors: list[grpc.aio.ServerInterceptor] = [self._tracing.interceptor()] if self._tracing else []
        interceptors += [BearerToken(config.token_file)] if config.token_file else []
        self.metrics = Metrics() if config.metrics_port is None else Prometheus()
        telemetry = Telemetry(self.metrics)
        self.repository = Repository(config, telemetry, self._tracing.batch if self._tracing else None)
        self.calls = Calls()
        self._server = grpc.aio.server(interceptors=interceptors, options=list(limits(config).items()))
        self._health = Health()
        self._relay = relay
        self.stopping = asyncio.Event()
        tolerant = TolerantServer(self._server)
        backend = Backend(repository=self.repository, telemetry=telemetry, calls=self.calls, command=self.command)
        for service in SERVICES:
            service.add_to_server(service.servicer(backend), tolerant)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, tolerant)
        for module in (health_pb2, reflection_pb2):
            POOL.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        reflection.enable_server_reflection(SERVICE_NAMES, self._server, pool=POOL)
        self.config = replace(config, port=bind(self._server, config))

    async def start(self) -> None:
        """Accept calls; health says which models are served."""
        gc.freeze()  # nothing of what is loaded goes away: no collection needs to walk through it
        await self._server.start()
        await self.set_health("", serving=True)
        await self._tell_health()
        self._watching = asyncio.create_task(self._watch())

    async def command(self, line: str, *, relayed: bool = False) -> None:
        """Obey `load NAME` or `unload NAME`. Raises what Repository.load and unload raise."""
        verb, _, name = line.partition(" ")
        await (self.repository.load(name) if verb == "load" else self.repository.unload(name))
        await self._tell_health()
        if not relayed:
            self._relay(line)

    async def follow(self, *, at_once: bool = False) -> None:
        """Serve new model files; see Repository.reload_changed."""
        await self.repository.reload_changed(wait_until_stable=not at_once)
        await self._tell_health()

    async def _watch(self) -> None:
        """Follow the model files for ever."""
        while self.config.watch:
            await asyncio.sleep(self.config.watch)
            await self.follow()

    async def _tell_health(self) -> None:
        """Say which models are served now."""
        for name in self.repository.all_names():
            await self.set_health(name, serving=name in self.repository.loaded_names())

    async def set_health(self, name: str, *, serving: bool) -> None:
        """What the health service says of a name."""
        await self._health.set(name, SERVING if serving else NOT_SERVING)

    async def run(self) -> None:
        """Wait for SIGTERM, SIGINT or `stopping`, then stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stopping.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hangup)
        await self.stopping.wait()
        log.info("shutting down: requests in flight have %g s to finish", self.config.grace)
        await self.stop()

    def _hangup(self) -> None:
        """SIGHUP: look at the model files now."""
        self._following = asyncio.create_task(self.follow(at_once=True))

    async def stop(self) -> None:
        """Say NOT_SERVING, accept what was sent before, refuse new calls, let those in flight finish within the grace, then end.

        What gRPC has read, but not handed over yet when it is stopped, it ends as CANCELLED, which nobody tries again; new calls
        are refused as UNAVAILABLE for a while, which takes so little time that hardly any are left.
        """
        self._watching.cancel()
        await self._health.end()
        await self._settle()
        self.calls.draining = True
        await self._settle()
        await self._server.stop(self.config.grace)
        await self.repository.close()
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)

    async def _settle(self) -> None:
        """Wait until calls have stopped coming, but not for ever."""
        pause, times = SETTLE
        for _ in range(times):
            before = self.calls.received
            await asyncio.sleep(pause)
            if self.calls.received == before:
                return


def start_tracing(config: Config) -> "Tracing | None":
    """What sends traces, when it is wanted. Raises StartupError when its packages are missing."""
    if config.trace_endpoint is None:
        return None
    try:
        from tercet.server.tracing import Tracing  # noqa: PLC0415  its packages are an extra
    except ImportError as error:
        raise StartupError(f"trace_endpoint: traces need more packages: pip install 'tercet[trace]' ({error})") from error
    return Tracing(config.trace_endpoint)


def limits(config: Config) -> dict[str, int]:
    """What one connection may do, in gRPC's terms."""
    age = {"grpc.max_connection_age_ms": milliseconds(config.max_connection_age)} if config.max_connection_age else {}
    return {
        "grpc.so_reuseport": int(config.workers > 1),
        "grpc.max_receive_message_length": config.max_message_bytes,
        "grpc.max_concurrent_streams": config.max_concurrent_streams,
        "grpc.max_connection_age_grace_ms": milliseconds(config.grace),
        **age,
        **CONNECTION,
    }


def milliseconds(seconds: float) -> int:
    """A time as gRPC takes it."""
    return min(max(1, round(seconds * 1e3)), INT)


def bind(server: Any, config: Config) -> int:
    """Bind the port, 0 for a free one; return it. Raises StartupError when that is not possible."""
    if config.workers == 1:  # else the parent holds it
        port.check(config)  # gRPC's own error names no cause, and goes to stderr
    credentials = tls(config)
    try:
        return int(server.add_secure_port(config.address, credentials) if credentials else server.add_insecure_port(config.address))
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {config.address}: {error}") from error


async def serve(config: Config, ready: Callable[[Config, Mapping[str, str]], None]) -> None:
    """Serve until SIGTERM or SIGINT. Once calls are accepted, `ready` gets the settings with the port, and Repository.engines."""
    server = Server(config)
    if isinstance(server.metrics, Prometheus):
        server.config = replace(server.config, metrics_port=tell(server.metrics.registry, config))
    await server.start()
    ready(server.config, server.repository.engines())
    await server.run()
