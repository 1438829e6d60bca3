"""The server of gRPC's interoperability tests (doc/interop-test-descriptions.md in github.com/grpc/grpc).

`python -m tests.server.transport.interop PORT [grpcio]` runs it for clients in other languages.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tercet.server import transport

messages: Any
services: Any
messages, services = grpc.protos_and_services("tests/server/transport/interop.proto")


def payload(size: int) -> Any:
    """That many zeros."""
    return messages.Payload(body=bytes(size))


async def echo_metadata(context: Any) -> None:
    """Send back the metadata that the tests name, at the begin and at the end."""
    for key, value in context.invocation_metadata():
        if key == "x-grpc-test-echo-initial":
            await context.send_initial_metadata(((key, value),))
        elif key == "x-grpc-test-echo-trailing-bin":
            context.set_trailing_metadata(((key, value),))


async def echo_status(request: Any, context: Any) -> None:
    """End with the status that a request asks for."""
    if request.HasField("response_status"):
        code = next(code for code in grpc.StatusCode if code.value[0] == request.response_status.code)
        await context.abort(code, request.response_status.message)


class TestServicer(services.TestServiceServicer):  # type: ignore[misc]
    """What the tests' clients expect."""

    async def EmptyCall(self, request: Any, context: Any) -> Any:
        await echo_metadata(context)
        return request

    async def UnaryCall(self, request: Any, context: Any) -> Any:
        if request.response_compressed.value:
            context.set_compression(grpc.Compression.Gzip)
        await echo_metadata(context)
        await echo_status(request, context)
        return messages.SimpleResponse(payload=payload(request.response_size))

    async def StreamingOutputCall(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if any(parameters.compressed.value for parameters in request.response_parameters):
            context.set_compression(grpc.Compression.Gzip)
        for parameters in request.response_parameters:
            await asyncio.sleep(parameters.interval_us / 1e6)
            if not parameters.compressed.value:
                context.disable_next_message_compression()
            yield messages.StreamingOutputCallResponse(payload=payload(parameters.size))

    async def StreamingInputCall(self, requests: AsyncIterator[Any], _context: Any) -> Any:
        size = sum([len(request.payload.body) async for request in requests])
        return messages.StreamingInputCallResponse(aggregated_payload_size=size)

    async def FullDuplexCall(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await echo_metadata(context)
        async for request in requests:
            await echo_status(request, context)
            async for response in self.StreamingOutputCall(request, context):
                yield response


async def serve(address: str, make: Any = transport.server) -> tuple[Any, int]:
    """A started server, and its port."""
    server = make()
    services.add_TestServiceServicer_to_server(TestServicer(), server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, port


async def main() -> None:
    """Serve until killed."""
    server, port = await serve(f"127.0.0.1:{sys.argv[1]}", grpc.aio.server if "grpcio" in sys.argv else transport.server)
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
