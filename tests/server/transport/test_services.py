"""The standard services, unchanged, over nghttp2 and over grpcio."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc import StatusCode
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.server.transport.conftest import failure, run, running

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def test_health(make: Callable[..., Any]) -> None:
    """Check, and Watch, which goes on until the client has enough."""

    async def main() -> None:
        async with running(make=make) as (server, address), grpc.aio.insecure_channel(address) as channel:
            servicer = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
            stub = health_pb2_grpc.HealthStub(channel)
            assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
            assert (await failure(stub.Check(health_pb2.HealthCheckRequest(service="x")))).code() is StatusCode.NOT_FOUND
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            await servicer.set("", NOT_SERVING)
            assert (await watch.read()).status == NOT_SERVING
            watch.cancel()
            await asyncio.sleep(0.05)

    run(main)


def test_reflection(make: Callable[..., Any]) -> None:
    """The blocking client of grpcio reads the descriptors."""

    async def main() -> None:
        async with running(make=make) as (server, address):
            health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
            reflection.enable_server_reflection([health.SERVICE_NAME, reflection.SERVICE_NAME], server)

            def ask() -> tuple[str, ...]:
                with grpc.insecure_channel(address) as channel:
                    database = ProtoReflectionDescriptorDatabase(channel)
                    assert database.FindFileContainingSymbol(health.SERVICE_NAME).package == "grpc.health.v1"
                    return tuple(database.get_services())

            assert health.SERVICE_NAME in await asyncio.to_thread(ask)

    run(main)
