"""deploy/ray_app.py without a cluster; benchmarks/ray_serve.py tries it on one."""

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
from tercet.server.rpc import Calls
from tercet.server.servicers import Backend
from tercet.server.telemetry import Telemetry

pytest.importorskip("ray", reason="ray is not installed: pip install -c constraints.txt 'tercet[ray]' in an environment of its own")
ray_app: Any = pytest.importorskip("deploy.ray_app")

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


class Refusing:
    """A repository whose models refuse every request."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def loaded_names(self) -> list[str]:
        """No model."""
        return []

    def get(self, _name: str) -> Any:
        """Refuse."""
        raise self._error


class Told:
    """Ray's context of a call: what the client is told."""

    code: grpc.StatusCode | None = None
    details = ""
    metadata: tuple[tuple[str, bytes], ...] = ()

    def set_code(self, code: grpc.StatusCode) -> None:
        """Keep it."""
        self.code = code

    def set_details(self, details: str) -> None:
        """Keep them."""
        self.details = details

    def set_trailing_metadata(self, metadata: list[tuple[str, bytes]]) -> None:
        """Keep it."""
        self.metadata = tuple(metadata)


def backend(repository: Any) -> Backend:
    """What servicers work with."""
    return Backend(repository=repository, telemetry=Telemetry(), calls=Calls(), command=ray_app.refuse)


def replica(error: Exception) -> Any:
    """A replica without models."""
    methods = ray_app.Methods()
    for add, servicer in ray_app.SERVICERS.items():
        add(servicer(backend(Refusing(error))), ray_app.TolerantServer(methods))
    return SimpleNamespace(methods=methods)


def test_every_rpc_has_a_method() -> None:
    """Ray finds a method for every RPC of both APIs, which takes the context by the name that Ray gives it."""
    registered = ray_app.Methods()
    for add, servicer in ray_app.SERVICERS.items():
        add(servicer, registered)
    assert {"ModelInfer", "ModelStreamInfer", "Classify", "Assess", "Answer", "Count"} <= set(registered)
    assert all("grpc_context" in getattr(ray_app.Replica, name).__code__.co_varnames for name in registered)


def test_a_proxy_does_not_read_requests() -> None:
    """What is added to Ray's proxy has no deserializer: requests stay bytes."""
    registered = ray_app.Methods()
    ray_app.add_faces(Mock(), registered)  # as Ray does
    assert registered
    assert {handler.request_deserializer for handler in registered.values()} == {None}


def test_an_error_keeps_its_details() -> None:
    """A refused request ends with the code, the text and the google.rpc details that the plain service gives."""
    told = Told()
    answer = ray_app.Replica.Answer(replica(InvalidInputError("numbers", "are wrong")), AnswerRequest().SerializeToString(), told)
    assert asyncio.run(answer).SerializeToString() == b""
    assert (told.code, told.details) == (grpc.StatusCode.INVALID_ARGUMENT, "numbers: are wrong")
    [(key, value)] = told.metadata
    violation = BadRequest()
    assert key == "grpc-status-details-bin"
    assert Status.FromString(value).details[0].Unpack(violation)
    assert violation.field_violations[0].field == "numbers"


def test_bytes_that_are_no_message() -> None:
    """A replica tells what cannot be read as INVALID_ARGUMENT."""
    told = Told()
    asyncio.run(ray_app.Replica.Answer(replica(ShuttingDownError("never")), b"\xff\xff", told))
    assert told.code == grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_ends_with_its_code() -> None:
    """A stream that fails raises, with the code set, which is how Ray hands it on."""
    told = Told()

    async def read() -> list[Any]:
        request = CountRequest(start=1, stop=3).SerializeToString()
        return [response async for response in ray_app.Replica.Count(replica(ShuttingDownError("ask another")), request, told)]

    with pytest.raises(ray_app.Ended, match="ask another"):
        asyncio.run(read())
    assert told.code == grpc.StatusCode.UNAVAILABLE


def test_health() -> None:
    """The standard health service says which models a replica serves, and that it cannot be watched."""
    models = SimpleNamespace(all_names=lambda: ["a", "b"], loaded_names=lambda: ["a"], ready=False)
    servicer, told = ray_app.HealthServicer(backend(models)), Told()
    methods = ray_app.Methods()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, ray_app.TolerantServer(methods))
    here = SimpleNamespace(methods=methods)

    def ask(name: str) -> Any:
        return asyncio.run(ray_app.Replica.Check(here, HealthCheckRequest(service=name).SerializeToString(), told))

    assert [ask(name).status for name in ("a", "b", "")] == [SERVING, NOT_SERVING, NOT_SERVING]
    listed = asyncio.run(ray_app.Replica.List(here, b"", told))
    assert {name: each.status for name, each in listed.statuses.items()} == {"a": SERVING, "b": NOT_SERVING, "": NOT_SERVING}
    ask("nope")
    assert (told.code, told.details) == (grpc.StatusCode.NOT_FOUND, "there is no model 'nope'; the models are a, b")

    async def watch() -> list[Any]:
        return [response async for response in ray_app.Replica.Watch(here, b"", told)]

    with pytest.raises(ray_app.Ended):
        asyncio.run(watch())
    assert told.code == grpc.StatusCode.UNIMPLEMENTED


def test_settings() -> None:
    """Settings are those of the service; one that is Ray's matter is refused with those that there are."""
    with pytest.raises(StartupError, match=r"port: not for Ray; there are .*models"):
        ray_app.app({"port": "1"})
    assert ray_app.app({"models": str(Path.cwd()), "threads": "2"})
