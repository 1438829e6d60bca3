"""The errors that a client can get, along the path of a request, and the gRPC status code of each.

    request bytes --decode--> rows --check--> batcher --queue--> engine --run--> rows --encode--> response bytes
                     |                 |                  |                |
             InvalidInputError  InvalidInputError   QueueFullError   InternalError
             ModelNotFoundError                     QueueTimeoutError
             ModelUnavailableError                  ShuttingDownError
             ModelRefusedError (repository RPCs)
             UnauthenticatedError
             DeadlinePassedError

The message says what is wrong, where, and what would be right. Any other exception is a bug: the log has it under an id, and the
client gets only the id. `tercet.server.rpc` turns them into the status of a call.
"""

import logging
import math
import secrets
from typing import ClassVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

log = logging.getLogger(__name__)

# Clients accept 8 KiB of trailing metadata, in which a message occurs three times, escaped.
MAX_MESSAGE_BYTES = 800
MAX_FIELD_BYTES = 200


def shorten(text: str, max_bytes: int) -> str:
    """Cut the middle out of a text of more than `max_bytes` bytes: it may quote a request of any length."""
    start, end = (part.encode(errors="replace") for part in (text[: 2 * max_bytes], text[-2 * max_bytes :]))
    if len(text) <= max_bytes and len(start) <= max_bytes:
        return text
    return f"{start[: max_bytes * 2 // 3].decode(errors='ignore')} ... {end[-max_bytes // 3 :].decode(errors='ignore')}"


class StartupError(Exception):
    """The service cannot start with these settings or files. The message is for the operator."""


class ServiceError(Exception):
    """An error that is reported to the client; `code` is its gRPC status code."""

    code: ClassVar[grpc.StatusCode]

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message, MAX_MESSAGE_BYTES))

    def details(self) -> list[Message]:
        """The google.rpc messages that tell a program what the text tells a person."""
        return []

    def status(self) -> Status:
        """Return code, message and details as google.rpc.Status."""
        packed = []
        for detail in self.details():
            packed.append(AnyMessage())
            packed[-1].Pack(detail)
        return Status(code=self.code.value[0], message=str(self), details=packed)


class InvalidInputError(ServiceError):
    """The request does not match the contract; `field` is the path of the wrong part."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, description: str) -> None:
        self.field, self.description = shorten(field, MAX_FIELD_BYTES), shorten(description, MAX_MESSAGE_BYTES)
        super().__init__(f"{field}: {description}")

    def details(self) -> list[Message]:
        return [BadRequest(field_violations=[BadRequest.FieldViolation(field=self.field, description=self.description)])]


class ModelNotFoundError(ServiceError):
    """There is no model of this name, or not in this version."""

    code = grpc.StatusCode.NOT_FOUND


class ModelUnavailableError(ServiceError):
    """The model exists, but is not trained or not loaded."""

    code = grpc.StatusCode.UNAVAILABLE


class ModelRefusedError(ServiceError):
    """The files in a model's folder did not pass verification."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class QueueFullError(ServiceError):
    """The queue has no room for the rows of this request."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(f"the queue is full: {waiting} of at most {limit} rows are waiting; retry in {retry_after:g} s")
        self.retry_after = retry_after

    def details(self) -> list[Message]:
        seconds = math.floor(self.retry_after)
        return [RetryInfo(retry_delay=Duration(seconds=seconds, nanos=int((self.retry_after - seconds) * 1e9)))]


class QueueTimeoutError(ServiceError):
    """The request waited as long as the queue allows and was never started."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DeadlinePassedError(ServiceError):
    """The client's deadline passed before the request was started."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class UnauthenticatedError(ServiceError):
    """The credentials are missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED


class ShuttingDownError(ServiceError):
    """The service accepts no more requests."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, message: str = "the service is shutting down; retry with another instance") -> None:
        super().__init__(message)


class InternalError(ServiceError):
    """A bug, or an engine that failed. The text is fixed; its id leads to the log record that has the cause."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, cause: BaseException) -> None:
        self.id = secrets.token_hex(6)
        super().__init__(f"internal error {self.id}; the service's log has the cause under this id")
        log.error("internal error %s", self.id, exc_info=cause)
