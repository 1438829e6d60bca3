"""The server: all faces on one port, health and reflection, and a clean end."""

import asyncio
import hmac
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from proto import POOL, diabetes_pb2_grpc, digits_pb2_grpc, fizzbuzz_pb2_grpc, inference_pb2_grpc
from service import port
from service.config import Config
from service.errors import StartupError, UnauthenticatedError, abort
from service.metrics import Metrics, Prometheus, tell
from service.repository import Repository
from service.servicers.diabetes import DiabetesServicer
from service.servicers.digits import DigitsServicer
from service.servicers.fizzbuzz import FizzBuzzServicer
from service.servicers.inference import InferenceServicer

log = logging.getLogger(__name__)

# gRPC reads these when the first server is made. A Python server needs a fifth less CPU time a call without the listener's own
# threads (benchmarks/README.md).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

SETTLE = 0.1, 5  # seconds without a new call, and how often at most that is waited for, before each step of the end

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = (
    "inference.GRPCInferenceService",
    "trefoil.v1.Diabetes",
    "trefoil.v1.Digits",
    "trefoil.v1.FizzBuzz",
    health.SERVICE_NAME,
    reflection.SERVICE_NAME,
)


class BearerToken(grpc.aio.ServerInterceptor):
    """Refuses calls that do not carry the token of a file; health checks need none."""

    def __init__(self, path: Path) -> None:
        """Raise StartupError when the file cannot be read or is empty."""
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"token_file: {path} cannot be read: {error}") from error
        if not token:
            raise StartupError(f"token_file: {path} is empty; it holds the token that callers must send")
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        """Let a call through, or end it as UNAUTHENTICATED."""
        sent = dict(call.invocation_metadata).get("authorization", "")
        if call.method.startswith(f"/{health.SERVICE_NAME}/") or hmac.compare_digest(str(sent).encode(), self._expected):
            return await continuation(call)

        async def refuse(_request: Any, context: Any) -> None:
            await abort(context, UnauthenticatedError("send the metadata 'authorization: Bearer TOKEN' with the service's token"))

        return grpc.unary_unary_rpc_method_handler(refuse)


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # it comes without types
    """The standard health service, whose watchers do not hold up the end."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Report changes until the service ends."""
        watching = asyncio.ensure_future(super().Watch(request, context))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({watching, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            ended.cancel()

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
        interceptors = (BearerToken(config.token_file),) if config.token_file else ()
        self.metrics = Metrics() if config.metrics_port is None else Prometheus()
        self.repository = Repository(config, self.metrics)
        options = {"grpc.so_reuseport": int(config.workers > 1), "grpc.max_receive_message_length": config.max_message_bytes}
        self._server = grpc.aio.server(interceptors=interceptors, options=list(options.items()))
        self._health = Health()
        self._relay = relay
        self.stopping = asyncio.Event()
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            InferenceServicer(self.repository, self.command), self._server
        )
        digits_pb2_grpc.add_DigitsServicer_to_server(DigitsServicer(self.repository), self._server)
        diabetes_pb2_grpc.add_DiabetesServicer_to_server(DiabetesServicer(self.repository), self._server)
        fizzbuzz_pb2_grpc.add_FizzBuzzServicer_to_server(FizzBuzzServicer(self.repository), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for module in (health_pb2, reflection_pb2):
            POOL.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        reflection.enable_server_reflection(SERVICES, self._server, pool=POOL)
        self.config = replace(config, port=bind(self._server, config))

    async def start(self) -> None:
        """Accept calls; health says which models are served."""
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
        """Serve new model files; see Repository.follow."""
        await self.repository.follow(at_once=at_once)
        await self._tell_health()

    async def _watch(self) -> None:
        """Follow the model files for ever."""
        while self.config.watch:
            await asyncio.sleep(self.config.watch)
            await self.follow()

    async def _tell_health(self) -> None:
        """Say which models are served now."""
        for name in self.repository.known:
            await self.set_health(name, serving=name in self.repository.names())

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
        self.repository.closing = True
        await self._settle()
        await self._server.stop(self.config.grace)
        await self.repository.close()

    async def _settle(self) -> None:
        """Wait until calls have stopped coming, but not for ever."""
        pause, times = SETTLE
        for _ in range(times):
            before = self.repository.came
            await asyncio.sleep(pause)
            if self.repository.came == before:
                return


def bind(server: Any, config: Config) -> int:
    """Bind the port, 0 for a free one; return it. Raises StartupError when that is not possible."""
    if config.workers == 1:  # else the parent holds it
        port.check(config)  # gRPC's own error names no cause, and goes to stderr
    try:
        return int(server.add_insecure_port(config.address))
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {config.address}: {error}") from error


async def serve(config: Config, ready: Callable[[Config, Iterable[str]], None]) -> None:
    """Serve until SIGTERM or SIGINT. Once calls are accepted, `ready` gets the settings with the port, and the models' names."""
    server = Server(config)
    if isinstance(server.metrics, Prometheus):
        server.config = replace(server.config, metrics_port=tell(server.metrics.registry, config))
    await server.start()
    ready(server.config, server.repository.names())
    await server.run()
