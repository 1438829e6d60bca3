"""Everything that can go wrong, along the way that a request takes, and the one place where it becomes a gRPC status.

    request bytes --decode--> rows --check--> batcher --queue--> engine --run--> rows --encode--> response bytes
                     |                 |                  |                |
             InvalidInputError  InvalidInputError   QueueFullError   InternalError
             ModelNotFoundError                     QueueTimeoutError
             ModelUnavailableError                  ShuttingDownError
             ModelRefusedError (repository RPCs)
             UnauthenticatedError
             DeadlinePassedError

A client always gets what is wrong, where, and what would be right. What is not listed here is a bug: the log has it with an id, the
client gets the id and nothing else.
"""

import functools
import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter
from typing import Any, ClassVar, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

log = logging.getLogger(__name__)

MOST_TEXT, MOST_FIELD = 800, 200  # bytes; clients take 8 KiB of trailers, where a text stands three times and escaped


def shorten(text: str, most: int) -> str:
    """A text without its middle when it has more than `most` bytes: it may quote a request, which may be of any length."""
    content = text[: 2 * most].encode(errors="replace"), text[-2 * most :].encode(errors="replace")
    if len(text) <= most and len(content[0]) <= most:
        return text
    return f"{content[0][: most * 2 // 3].decode(errors='ignore')} ... {content[1][-most // 3 :].decode(errors='ignore')}"


class StartupError(Exception):
    """The service cannot start as it was told to; the message is for the person who started it."""


class ServiceError(Exception):
    """An error that a client is told about; `code` is its gRPC status."""

    code: ClassVar[grpc.StatusCode]

    def __init__(self, text: str) -> None:
        super().__init__(shorten(text, MOST_TEXT))

    def details(self) -> list[Message]:
        """Messages of google.rpc that say the same to a program."""
        return []


class InvalidInputError(ServiceError):
    """The request is not what the contract accepts. `field` is the path of the part that is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, description: str) -> None:
        self.field, self.description = shorten(field, MOST_FIELD), shorten(description, MOST_TEXT)
        super().__init__(f"{field}: {description}")

    def details(self) -> list[Message]:
        """The offending field, as a BadRequest."""
        return [BadRequest(field_violations=[BadRequest.FieldViolation(field=self.field, description=self.description)])]


class ModelNotFoundError(ServiceError):
    """There is no such model, or not in that version."""

    code = grpc.StatusCode.NOT_FOUND


class ModelUnavailableError(ServiceError):
    """The model is known, but not trained or not loaded."""

    code = grpc.StatusCode.UNAVAILABLE


class ModelRefusedError(ServiceError):
    """What lies in a model's folder is not fit to be served."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class QueueFullError(ServiceError):
    """So many rows wait already that these would not be answered in time."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(f"{waiting} rows wait already and the queue holds {limit}: try again in {retry_after:g} s")
        self.retry_after = retry_after

    def details(self) -> list[Message]:
        """When to try again, as a RetryInfo."""
        seconds = math.floor(self.retry_after)
        return [RetryInfo(retry_delay=Duration(seconds=seconds, nanos=int((self.retry_after - seconds) * 1e9)))]


class QueueTimeoutError(ServiceError):
    """The request waited for as long as the queue allows, and was never started."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DeadlinePassedError(ServiceError):
    """The client waits no more; the request came too late to be started."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class UnauthenticatedError(ServiceError):
    """The credentials are missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED


class ShuttingDownError(ServiceError):
    """The service takes no more work."""

    code = grpc.StatusCode.UNAVAILABLE


class InternalError(ServiceError):
    """A bug, or an engine that failed. The text is fixed; the id leads to the line in the log that has the cause."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, cause: BaseException) -> None:
        self.id = secrets.token_hex(6)
        super().__init__(f"internal error {self.id}; the service's log has the cause under this id")
        log.error("internal error %s", self.id, exc_info=cause)


def status(error: ServiceError) -> Status:
    """The error as google.rpc.Status: code, message, typed details."""
    packed = []
    for detail in error.details():
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    return Status(code=error.code.value[0], message=str(error), details=packed)


def known(error: Exception) -> ServiceError:
    """The error as one that a client is told about; an unforeseen one is logged and becomes opaque."""
    return error if isinstance(error, ServiceError) else InternalError(error)


def admit(servicer: Any, context: Any) -> None:
    """Raise ShuttingDownError or DeadlinePassedError when a call comes too late; gRPC cancels the latter, but not at once."""
    servicer.admit()
    if context.time_remaining() == 0:
        raise DeadlinePassedError("the deadline had passed when the request was read")


async def end(error: BaseException, servicer: Any, method: str, context: Any) -> NoReturn:
    """Count a call that failed and end it with the status of its error; one that was cancelled has ended already."""
    if not isinstance(error, Exception):
        servicer.metrics.failed(method, "CANCELLED")
        raise error
    failure = known(error)
    servicer.metrics.failed(method, failure.code.name)
    await abort(context, failure)


async def abort(context: Any, cause: Exception) -> NoReturn:
    """End a call with the status of an error."""
    error = known(cause)
    metadata = (("grpc-status-details-bin", status(error).SerializeToString()),) if error.details() else ()
    await context.abort(error.code, str(error), trailing_metadata=metadata)
    raise AssertionError("abort returned")  # context.abort raises


class Unreadable:
    """Stands in for a request whose bytes are no message."""

    id = ""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def refuse_unreadable(request: Any) -> None:
    """Raise InvalidInputError when a request could not be read."""
    if request.__class__ is Unreadable:
        raise InvalidInputError("request", request.reason)


Method = Callable[[Any, Any, Any], Awaitable[Any]]
StreamMethod = Callable[[Any, Any, Any], AsyncIterator[Any]]


def answers(method: Method) -> Method:
    """Make a unary method of a servicer end with the right status when it raises."""
    name = method.__name__

    @functools.wraps(method)
    async def guarded(servicer: Any, request: Any, context: Any) -> Any:
        started = perf_counter()
        try:
            admit(servicer, context)
            refuse_unreadable(request)
            response = await method(servicer, request, context)
        except BaseException as error:  # noqa: BLE001  whatever it is: this is where it becomes a status
            await end(error, servicer, name, context)
        servicer.metrics.answered(name, perf_counter() - started)
        return response

    return guarded


def streams(method: StreamMethod) -> StreamMethod:
    """Make a streaming method of a servicer end with the right status when it raises."""
    name = method.__name__

    @functools.wraps(method)
    async def guarded(servicer: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            admit(servicer, context)
            refuse_unreadable(request)
            async for response in method(servicer, request, context):
                yield response
        except Exception as error:  # noqa: BLE001  whatever it is: this is where it becomes a status
            await end(error, servicer, name, context)

    return guarded
