"""The life of a call: it is accepted, its request parsed, the servicer's method run, and it ends with a response or a status."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from tercet.errors import DeadlineExceededError, InternalError, InvalidInputError, ServiceError, ShuttingDownError
from tercet.server.repository import Repository
from tercet.server.telemetry import Telemetry

Parse = Callable[[bytes], Any]
UnaryMethod = Callable[[Any, Any, Any], Awaitable[Any]]
StreamingMethod = Callable[[Any, Any, Any], AsyncIterator[Any]]


class Calls:
    """Counts the calls that this process has received, and refuses new ones once `draining` is set."""

    def __init__(self) -> None:
        self.received = 0
        self.draining = False

    def accept(self) -> None:
        """Count a new call. Raises ShuttingDownError while draining."""
        self.received += 1
        if self.draining:
            raise ShuttingDownError


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The parts of one process that all its servicers share."""

    repository: Repository
    telemetry: Telemetry
    calls: Calls
    command: Callable[[str], Awaitable[None]]  # runs `load NAME` or `unload NAME`


class BaseServicer:
    """Base of the gRPC servicers. A method decodes the request, calls a model and encodes its output."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend


def parse_or_error(parse: Parse) -> Parse:
    """Make a parser return an InvalidInputError in place of a request that it cannot parse; see `check_parsed`."""

    def parse_request(content: bytes) -> Any:
        try:
            return parse(content)
        except DecodeError as error:
            return InvalidInputError("request", str(error))

    return parse_request


def check_parsed(request: Any) -> None:
    """Raise InvalidInputError when a request could not be parsed."""
    if isinstance(request, InvalidInputError):
        raise request


class TolerantServer:
    """Wraps the gRPC server so that request bytes that cannot be parsed become INVALID_ARGUMENT.

    gRPC itself would answer UNKNOWN and log a traceback for each. Pass it to the generated add_..._to_server functions.
    """

    def __init__(self, server: Any, wrap_parser: Callable[[Parse], Parse | None] = parse_or_error) -> None:
        """`wrap_parser` makes the request parser of each method; with None requests stay bytes."""
        self._server, self._wrap_parser = server, wrap_parser

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Do nothing: generated code adds the same methods with add_registered_method_handlers as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        tolerant = {
            name: handler._replace(request_deserializer=self._wrap_parser(handler.request_deserializer))
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, tolerant),))
        self._server.add_registered_method_handlers(service, tolerant)


def as_service_error(error: Exception) -> ServiceError:
    """The error to report to the client. An unexpected exception is logged and becomes an InternalError without its text."""
    return error if isinstance(error, ServiceError) else InternalError(error)


async def abort_call(context: Any, error: ServiceError) -> NoReturn:
    """End a call with the status of an error."""
    metadata = (("grpc-status-details-bin", error.status().SerializeToString()),) if error.detail else ()
    await context.abort(error.code, str(error), trailing_metadata=metadata)
    raise AssertionError("context.abort returned")


def _start(servicer: BaseServicer, request: Any, context: Any) -> None:
    """Accept a call. Raises ShuttingDownError, DeadlineExceededError or InvalidInputError."""
    servicer.backend.calls.accept()
    if context.time_remaining() == 0:  # gRPC will cancel this call, but not at once
        raise DeadlineExceededError("the deadline had passed before the request was read")
    check_parsed(request)


async def _fail(error: BaseException, servicer: BaseServicer, method: str, context: Any) -> NoReturn:
    """Count a failed call and end it with the status of its error. A cancelled call has ended already."""
    if not isinstance(error, Exception):
        servicer.backend.telemetry.call_failed(method, "CANCELLED")
        raise error
    failure = as_service_error(error)
    servicer.backend.telemetry.call_failed(method, failure.code.name)
    await abort_call(context, failure)


def unary_rpc(method: UnaryMethod) -> UnaryMethod:
    """Decorate a servicer's unary method: accept the call, record it, and turn exceptions into a status."""
    name = method.__name__

    @functools.wraps(method)
    async def call(servicer: BaseServicer, request: Any, context: Any) -> Any:
        started = perf_counter()
        try:
            _start(servicer, request, context)
            response = await method(servicer, request, context)
        except BaseException as error:  # noqa: BLE001  every exception has to become a status
            await _fail(error, servicer, name, context)
        servicer.backend.telemetry.call_answered(name, perf_counter() - started)
        return response

    return call


def streaming_rpc(method: StreamingMethod) -> StreamingMethod:
    """Decorate a servicer's streaming method: accept the call, record its failure, and turn exceptions into a status."""
    name = method.__name__

    @functools.wraps(method)
    async def call(servicer: BaseServicer, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            _start(servicer, request, context)
            async for response in method(servicer, request, context):
                yield response
        except Exception as error:  # noqa: BLE001  every exception has to become a status
            await _fail(error, servicer, name, context)

    return call
