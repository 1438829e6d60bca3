r"""The same servicers, batchers and engines as replicas of a Ray Serve application, behind Ray's gRPC ingress.

With `deploy` importable and the models there on every node, and Ray started on it, once, on one of them:

    serve start --proxy-location EveryNode --grpc-port 8001 --grpc-disable-reflection \
        --grpc-servicer-functions deploy.ray_app.add_faces
    serve run deploy.ray_app:app models=/models

Each `name=value` is one of SETTINGS. docs/deploy.md has what cannot be had so, and what it costs.
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
from tercet.errors import ModelNotFoundError, ModelRefusedError, StartupError
from tercet.server.config import Config
from tercet.server.repository import Repository
from tercet.server.rpc import Calls, TolerantServer, unary_rpc
from tercet.server.servicers import SERVICES, Backend, BaseServicer
from tercet.server.telemetry import Telemetry


class HealthServicer(BaseServicer, health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it comes without types
    """What a balancer asks before it sends calls to a node: an ingress that knows no replica yet has no answer."""

    @unary_rpc
    async def Check(self, request: HealthCheckRequest, _context: Any) -> HealthCheckResponse:  # noqa: N802
        """Whether a model is served, or all are. Raises ModelNotFoundError."""
        return HealthCheckResponse(status=self._status(request.service))

    @unary_rpc
    async def List(self, _request: Any, _context: Any) -> HealthListResponse:  # noqa: N802
        """Check for every name."""
        names = ("", *self.backend.repository.all_names())
        return HealthListResponse(statuses={name: HealthCheckResponse(status=self._status(name)) for name in names})

    async def Watch(self, _request: Any, context: Any) -> AsyncIterator[HealthCheckResponse]:  # noqa: N802
        """Refuse: watchers would fill a replica. Clients that watch take this for SERVING, as gRPC's standard says."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not on Ray: ask Check")
        yield HealthCheckResponse()  # never; it makes this a stream

    def _status(self, name: str) -> HealthCheckResponse.ServingStatus:
        """Of a model, or of all for an empty name. Raises ModelNotFoundError."""
        repository = self.backend.repository
        if name and name not in repository.all_names():
            raise ModelNotFoundError(f"there is no model {name!r}; the models are {', '.join(repository.all_names())}")
        serving = name in repository.loaded_names() if name else repository.ready
        return HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING


SERVICERS: dict[Callable[[Any, Any], None], type[BaseServicer]] = {
    **{service.add_to_server: service.servicer for service in SERVICES},
    health_pb2_grpc.add_HealthServicer_to_server: HealthServicer,
}
SETTINGS = {  # of `tercet serve`; the others are Ray's matter
    *("models", "engine", "device", "threads", "require_signed", "watch"),
    *("max_request_rows", "max_batch_rows", "max_queue_rows", "max_delay", "queue_timeout"),
}
REPLICAS = {
    # With HAProxy a replica counts only what it works on: 11 were a busy one, with 128 callers; the others wait before it.
    "autoscaling_config": {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4},
    "max_ongoing_requests": 256,  # of one replica; more wait at Ray's proxies
    "max_queued_requests": 4096,  # at one proxy; more are RESOURCE_EXHAUSTED
}


class Ended(Exception):  # noqa: N818  as Ray sees it; the context has the status
    """A call has ended with an error."""


class Context:
    """What servicers need of a call's context, on Ray's."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def time_remaining(self) -> None:
        """Not known: Ray's proxy keeps the deadline, and cancels the call."""

    async def abort(self, code: grpc.StatusCode, text: str, trailing_metadata: Sequence[tuple[str, bytes]] = ()) -> NoReturn:
        """Set the status, and raise Ended."""
        self._ray.set_code(code)
        self._ray.set_details(text)
        self._ray.set_trailing_metadata(list(trailing_metadata))
        raise Ended(text)


class Methods(dict[str, Any]):
    """Stands in for a server to which servicers are added: keeps their methods by name."""

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Keep nothing: generated code registers the same methods, next."""

    def add_registered_method_handlers(self, _service: str, handlers: Mapping[str, Any]) -> None:
        """Keep the methods of a servicer."""
        self.update(handlers)


class Replica:
    """All models and servicers, without a port. Ray calls its methods, which are named as the RPCs and get requests as bytes."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load the models. Raises StartupError."""
        telemetry = Telemetry()
        self._repository, self.methods = Repository(config, telemetry), Methods()
        backend = Backend(repository=self._repository, telemetry=telemetry, calls=Calls(), command=refuse)
        for add, servicer in SERVICERS.items():
            add(servicer(backend), TolerantServer(self.methods))
        self._watching = asyncio.create_task(self._watch(config.watch))

    async def _watch(self, pause: float) -> None:
        """Follow the model files for ever."""
        while pause:
            await asyncio.sleep(pause)
            await self._repository.reload_changed()


async def refuse(line: str) -> NoReturn:
    """Answer `load NAME` and `unload NAME`: Ray hands a call to one replica, and the others would not hear of it."""
    raise ModelRefusedError(
        f"cannot {line} in one replica alone: change the files in the models' folder, which each replica follows"
    )


def unary(name: str) -> Callable[..., Any]:
    """The method of a Replica for an RPC with one response."""

    async def method(self: Replica, content: bytes, grpc_context: Any) -> Any:
        handler = self.methods[name]
        try:
            return await handler.unary_unary(handler.request_deserializer(content), Context(grpc_context))
        except Ended:
            return (
                Empty()
            )  # without a response Ray drops the trailing metadata; with one gRPC drops the response, as the code is not OK

    return method


def streaming(name: str) -> Callable[..., Any]:
    """The method of a Replica for an RPC with a stream of responses."""

    async def method(self: Replica, content: Any, grpc_context: Any) -> AsyncIterator[Any]:
        handler, context = self.methods[name], Context(grpc_context)
        read = handler.request_deserializer
        if handler.request_streaming:
            responses = handler.stream_stream((read(part) async for part in content), context)
        else:
            responses = handler.unary_stream(read(content), context)
        async for response in responses:
            yield response

    return method


def declare() -> None:
    """Give Replica its methods: Ray looks for them by name."""
    declared = Methods()
    for add, servicer in SERVICERS.items():
        add(servicer, declared)
    for name, handler in declared.items():
        setattr(Replica, name, (streaming if handler.response_streaming else unary)(name))


declare()


def add_faces(servicer: Any, server: Any) -> None:
    """Add all servicers to the gRPC server of a proxy of Ray's, which brings a servicer that it does not call.

    Requests stay bytes: the replica reads them, and the proxy need not.
    """
    for add in SERVICERS:
        add(servicer, TolerantServer(server, lambda _parse: None))


def app(settings: dict[str, str]) -> serve.Application:
    """The application, with some of SETTINGS. Raises StartupError."""
    if unknown := settings.keys() - SETTINGS:
        raise StartupError(f"{', '.join(sorted(unknown))}: not for Ray; there are {', '.join(sorted(SETTINGS))}")
    config = msgspec.convert(settings, Config, strict=False, dec_hook=lambda kind, value: kind(value))
    return serve.deployment(Replica, name="tercet", **REPLICAS).bind(replace(config, models=config.models.absolute()))
