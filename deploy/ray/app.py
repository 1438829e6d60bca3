r"""The servicers, batchers and engines as replicas of a Ray Serve application, behind Ray's gRPC ingress.

Ray has to run on every node, with `deploy` importable and the models in the same place. Then, once, on one of them:

    serve start --proxy-location EveryNode --grpc-port 8001 --grpc-disable-reflection \
        --grpc-servicer-functions deploy.ray.app.add_servicers
    serve run deploy.ray.app:app models=/models

Each `name=value` is one of SETTINGS. README.md in this folder says what does not work on Ray, and what it costs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import grpc
import msgspec
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListResponse
from ray import serve
from tercet.errors import ModelNotFoundError, ModelRefusedError, ServiceError, StartupError
from tercet.server.config import Config
from tercet.server.repository import Repository
from tercet.server.rpc import BaseServicer, RpcServer
from tercet.server.servicers import SERVICES
from tercet.server.telemetry import Telemetry


class NotOnRayError(ServiceError, code=grpc.StatusCode.UNIMPLEMENTED):
    """The method does not exist on Ray."""


class HealthServicer(BaseServicer, health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it comes without types
    """Health checks for the balancer: the ingress of a node that has not heard of a replica yet does not answer them."""

    async def Check(self, request: HealthCheckRequest, _context: Any) -> HealthCheckResponse:
        """Return the status of a model, or of all for an empty name. Raises ModelNotFoundError."""
        return HealthCheckResponse(status=self._status(request.service))

    async def List(self, _request: Any, _context: Any) -> HealthListResponse:
        """Return the status of every name."""
        names = ("", *self.repository.all_names())
        return HealthListResponse(statuses={name: HealthCheckResponse(status=self._status(name)) for name in names})

    async def Watch(self, _request: Any, _context: Any) -> AsyncIterator[HealthCheckResponse]:
        """Refuse, as watchers would fill a replica. By gRPC's standard, clients that watch then assume SERVING."""
        raise NotOnRayError("Watch is not available on Ray; call Check")
        yield  # type: ignore[unreachable]  # it makes this a generator

    def _status(self, name: str) -> HealthCheckResponse.ServingStatus:
        repository = self.repository
        if name and name not in repository.all_names():
            raise ModelNotFoundError(f"there is no model {name!r}; the models are {', '.join(repository.all_names())}")
        serving = name in repository.loaded_names() if name else repository.ready
        return HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING


SERVICERS = {**SERVICES, health_pb2_grpc.add_HealthServicer_to_server: HealthServicer}
SETTINGS = {  # the options of `tercet serve` that apply; Ray decides the others
    *("models", "engine", "device", "threads", "require_signed", "watch"),
    *("max_request_rows", "max_batch_rows", "max_queue_rows", "max_delay", "queue_timeout"),
}
REPLICAS: dict[str, Any] = {
    # With HAProxy a replica counts only the calls that it works on; the others wait in front of it. So even a busy one counts few.
    "autoscaling_config": {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4},
    "max_ongoing_requests": 256,  # per replica; more wait at Ray's proxies
    "max_queued_requests": 4096,  # per proxy; more are RESOURCE_EXHAUSTED
}


class CallFailed(Exception):  # noqa: N818  its name is seen in Ray's log
    """Ends a call in Ray; the context has the status."""


class Context:
    """The parts of a call's context that servicers use, implemented with Ray's context."""

    def __init__(self, ray_context: Any) -> None:
        self._ray_context = ray_context

    def time_remaining(self) -> None:
        """Return None: Ray's proxy keeps the deadline and cancels the call."""

    async def abort(self, code: grpc.StatusCode, text: str, trailing_metadata: Sequence[tuple[str, bytes]] = ()) -> NoReturn:
        """Set the status and raise CallFailed."""
        self._ray_context.set_code(code)
        self._ray_context.set_details(text)
        self._ray_context.set_trailing_metadata(list(trailing_metadata))
        raise CallFailed(text)


class Methods(dict[str, Any]):
    """Takes the place of a server to which servicers are added, and keeps their methods by name."""

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Do nothing: generated code adds the same methods with add_registered_method_handlers as well."""

    def add_registered_method_handlers(self, _service: str, handlers: Mapping[str, Any]) -> None:
        """Keep the methods of a servicer."""
        self.update(handlers)


class Replica:
    """All models and servicers, without a port. Ray calls its methods, which are named after the RPCs, with requests as bytes."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load the models. Raises StartupError."""
        telemetry = Telemetry()
        self._repository, self.methods = Repository(config, telemetry), Methods()
        for add_to_server, servicer in SERVICERS.items():
            add_to_server(servicer(self._repository, telemetry, refuse), RpcServer(self.methods, telemetry))
        self._watching = asyncio.create_task(self._watch(config.watch))

    async def _watch(self, pause: float) -> None:
        while pause:
            await asyncio.sleep(pause)
            await self._repository.reload_changed()


async def refuse(command: str) -> NoReturn:
    """Refuse `load NAME` and `unload NAME`, which Ray hands to one replica only. Raises ModelRefusedError."""
    raise ModelRefusedError(
        f"cannot {command} in a single replica: change the files in the models folder, which each replica watches"
    )


def unary(name: str) -> Callable[..., Any]:
    """Return the method of Replica for an RPC with one response."""

    async def method(self: Replica, content: bytes, grpc_context: Any) -> Any:
        handler = self.methods[name]
        try:
            return await handler.unary_unary(content, Context(grpc_context))
        except CallFailed:
            return Empty()  # without a response Ray drops the trailing metadata; gRPC drops the response, as the code is not OK

    return method


def streaming(name: str) -> Callable[..., Any]:
    """Return the method of Replica for an RPC with a stream of responses."""

    async def method(self: Replica, content: Any, grpc_context: Any) -> AsyncIterator[Any]:
        handler, context = self.methods[name], Context(grpc_context)
        method = handler.stream_stream if handler.request_streaming else handler.unary_stream
        async for response in method(content, context):
            yield response

    return method


def add_methods() -> None:
    """Give Replica a method per RPC: Ray looks for them by name."""
    methods = Methods()
    for add_to_server, servicer in SERVICERS.items():
        add_to_server(servicer, methods)
    for name, handler in methods.items():
        setattr(Replica, name, (streaming if handler.response_streaming else unary)(name))


add_methods()


def add_servicers(servicer: Any, server: Any) -> None:
    """Add all services to the gRPC server of Ray's proxy, which passes a servicer that it does not call.

    Requests stay bytes: the replica parses them.
    """
    for add_to_server in SERVICERS:
        add_to_server(servicer, RpcServer(server, Telemetry()))


def app(settings: dict[str, str]) -> serve.Application:
    """Return the application; `settings` are some of SETTINGS. Raises StartupError."""
    if unknown := settings.keys() - SETTINGS:
        raise StartupError(f"{', '.join(sorted(unknown))}: not a setting on Ray; these are: {', '.join(sorted(SETTINGS))}")
    config = msgspec.convert(settings, Config, strict=False, dec_hook=lambda kind, value: kind(value))
    return serve.deployment(Replica, name="tercet", **REPLICAS).bind(replace(config, models=config.models.absolute()))
