"""The life of a call: it is accepted, its request parsed, the servicer's method run, and it ends with a response or a status."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from tercet.errors import DeadlineExceededError, InternalError, InvalidInputError, ServiceError, ShuttingDownError
from tercet.server.repository import Repository
from tercet.server.telemetry import Telemetry


@dataclass(eq=False)
class BaseServicer:
    """Base of the gRPC servicers. A method calls a model with the rows of a request and encodes its output, or raises."""

    repository: Repository
    telemetry: Telemetry
    command: Callable[[str], Awaitable[None]]  # runs `load NAME` or `unload NAME`


def as_service_error(error: Exception) -> ServiceError:
    """The error to report to the client. An unexpected exception is logged and becomes an InternalError without its text."""
    if isinstance(error, DecodeError):
        return InvalidInputError("request", str(error))
    return error if isinstance(error, ServiceError) else InternalError(error)


async def abort_call(context: Any, error: ServiceError) -> NoReturn:
    """End a call with the status of an error."""
    metadata = (("grpc-status-details-bin", error.status().SerializeToString()),) if error.detail else ()
    await context.abort(error.code, str(error), trailing_metadata=metadata)
    raise AssertionError("context.abort returned")


class RpcServer:
    """Adds servicers to a gRPC server: pass it to the generated add_..._to_server functions.

    It wraps each method: calls are counted and recorded, and exceptions become a status. Requests are parsed here, as gRPC answers
    UNKNOWN to bytes that cannot be parsed, and logs a traceback. A stream of requests stays bytes, which the method parses.
    """

    def __init__(self, server: Any, telemetry: Telemetry) -> None:
        self._server, self._telemetry = server, telemetry
        self.services: list[str] = []  # their full names
        self.received = 0  # calls
        self.draining = False  # whether to refuse new calls

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Do nothing: generated code adds the same methods with add_registered_method_handlers as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.services.append(service)
        wrapped = {name: self._wrap(name, handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))
        self._server.add_registered_method_handlers(service, wrapped)

    def _accept(self, context: Any) -> None:
        """Count a new call. Raises ShuttingDownError while draining, and DeadlineExceededError when it comes too late."""
        self.received += 1
        if self.draining:
            raise ShuttingDownError
        if context.time_remaining() == 0:  # gRPC will cancel this call, but not at once
            raise DeadlineExceededError("the deadline had passed before the request was read")

    def _wrap(self, name: str, handler: Any) -> Any:
        kind = "_".join("stream" if stream else "unary" for stream in (handler.request_streaming, handler.response_streaming))
        method, parse = getattr(handler, kind), handler.request_deserializer

        async def unary(content: Any, context: Any) -> Any:
            started = perf_counter()
            try:
                self._accept(context)
                response = await method(parse(content), context)
            except BaseException as error:  # noqa: BLE001  every exception has to become a status
                await self._fail(error, name, context)
            self._telemetry.call_answered(name, perf_counter() - started)
            return response

        async def stream(content: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._accept(context)
                async for response in method(content if handler.request_streaming else parse(content), context):
                    yield response
            except Exception as error:  # noqa: BLE001  every exception has to become a status
                await self._fail(error, name, context)

        return handler._replace(request_deserializer=None, **{kind: stream if handler.response_streaming else unary})

    async def _fail(self, error: BaseException, method: str, context: Any) -> NoReturn:
        """Count a failed call and end it with the status of its error. A cancelled call has ended already."""
        if isinstance(error, grpc.aio.AbortError):  # the method has ended the call
            raise error
        if not isinstance(error, Exception):
            self._telemetry.call_failed(method, "CANCELLED")
            raise error
        failure = as_service_error(error)
        self._telemetry.call_failed(method, failure.code.name)
        await abort_call(context, failure)
