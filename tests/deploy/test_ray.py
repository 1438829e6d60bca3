"""deploy/ray/app.py without a cluster; deploy/ray/benchmark.py runs it on one."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from tercet.errors import InvalidInputError, ShuttingDownError, StartupError
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.server.rpc import RpcServer
from tercet.server.telemetry import Telemetry

pytest.importorskip("ray", reason="Ray is not installed: pip install -c constraints.txt -e '.[serve,ray]'")
ray_app: Any = pytest.importorskip("deploy.ray.app")

pytestmark = pytest.mark.slow
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


class Refusing:
    """A repository whose models refuse every request."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def loaded_names(self) -> list[str]:
        return []

    def get(self, _name: str) -> Any:
        raise self._error


class RayContext:
    """Ray's context of a call: keeps the status that the client gets."""

    code: grpc.StatusCode | None = None
    details = ""
    metadata: tuple[tuple[str, bytes], ...] = ()

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: list[tuple[str, bytes]]) -> None:
        self.metadata = tuple(metadata)


def replica(error: Exception) -> Any:
    """Return a replica whose models raise `error`."""
    methods = ray_app.Methods()
    for add, servicer in ray_app.SERVICERS.items():
        add(servicer(Refusing(error), Telemetry(), ray_app.refuse), RpcServer(methods, Telemetry()))
    return SimpleNamespace(methods=methods)


def test_every_rpc_has_a_method() -> None:
    """Ray finds a method for every RPC of both APIs, which takes the context by the name that Ray gives it."""
    methods = ray_app.Methods()
    for add, servicer in ray_app.SERVICERS.items():
        add(servicer, methods)
    assert {"ModelInfer", "ModelStreamInfer", "Classify", "Assess", "Answer", "Count"} <= set(methods)
    assert all("grpc_context" in getattr(ray_app.Replica, name).__code__.co_varnames for name in methods)


def test_a_proxy_does_not_parse_requests() -> None:
    """The methods added to Ray's proxy have no deserializer: requests stay bytes."""
    methods = ray_app.Methods()
    ray_app.add_servicers(Mock(), methods)  # as Ray does
    assert methods
    assert {handler.request_deserializer for handler in methods.values()} == {None}


def test_an_error_keeps_its_details() -> None:
    """A refused request ends with the same code, text and google.rpc details as in `tercet serve`."""
    context = RayContext()
    answer = ray_app.Replica.Answer(
        replica(InvalidInputError("numbers", "are wrong")), AnswerRequest().SerializeToString(), context
    )
    assert asyncio.run(answer).SerializeToString() == b""
    assert (context.code, context.details) == (grpc.StatusCode.INVALID_ARGUMENT, "numbers: are wrong")
    [(key, value)] = context.metadata
    violation = BadRequest()
    assert key == "grpc-status-details-bin"
    assert Status.FromString(value).details[0].Unpack(violation)
    assert violation.field_violations[0].field == "numbers"


def test_a_malformed_request() -> None:
    """Bytes that cannot be parsed are INVALID_ARGUMENT."""
    context = RayContext()
    asyncio.run(ray_app.Replica.Answer(replica(ShuttingDownError("never")), b"\xff\xff", context))
    assert context.code == grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_ends_with_its_code() -> None:
    """A stream that fails raises with the code set, which Ray passes on."""
    context = RayContext()

    async def read() -> list[Any]:
        request = CountRequest(start=1, stop=3).SerializeToString()
        return [response async for response in ray_app.Replica.Count(replica(ShuttingDownError("ask another")), request, context)]

    with pytest.raises(ray_app.CallFailed, match="ask another"):
        asyncio.run(read())
    assert context.code == grpc.StatusCode.UNAVAILABLE


def test_health() -> None:
    """The standard health service says which models a replica serves; Watch is UNIMPLEMENTED."""
    models = SimpleNamespace(all_names=lambda: ["a", "b"], loaded_names=lambda: ["a"], ready=False)
    servicer, context = ray_app.HealthServicer(models, Telemetry(), ray_app.refuse), RayContext()
    methods = ray_app.Methods()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, RpcServer(methods, Telemetry()))
    here = SimpleNamespace(methods=methods)

    def ask(name: str) -> Any:
        return asyncio.run(ray_app.Replica.Check(here, HealthCheckRequest(service=name).SerializeToString(), context))

    assert [ask(name).status for name in ("a", "b", "")] == [SERVING, NOT_SERVING, NOT_SERVING]
    listed = asyncio.run(ray_app.Replica.List(here, b"", context))
    assert {name: each.status for name, each in listed.statuses.items()} == {"a": SERVING, "b": NOT_SERVING, "": NOT_SERVING}
    ask("nope")
    assert (context.code, context.details) == (grpc.StatusCode.NOT_FOUND, "there is no model 'nope'; the models are a, b")

    async def watch() -> list[Any]:
        return [response async for response in ray_app.Replica.Watch(here, b"", context)]

    with pytest.raises(ray_app.CallFailed):
        asyncio.run(watch())
    assert context.code == grpc.StatusCode.UNIMPLEMENTED


def test_settings() -> None:
    """Settings are options of `tercet serve`; an option that Ray decides is refused with a list of the settings."""
    with pytest.raises(StartupError, match=r"port: not a setting on Ray; these are: .*models"):
        ray_app.app({"port": "1"})
    assert ray_app.app({"models": str(Path.cwd()), "threads": "2"})
