"""The errors that a client can get, along the path of a request, and the gRPC status code of each.

    request bytes --decode--> rows --check--> batcher --queue--> engine --run--> rows --encode--> response bytes
                     |                 |                  |                |
             InvalidInputError  InvalidInputError   QueueFullError   InternalError
             ModelNotFoundError                     DeadlineExceededError
             ModelUnavailableError                  ShuttingDownError
             ModelRefusedError (repository RPCs)
             UnauthenticatedError
             DeadlineExceededError

The message says what is wrong, where, and what would be right. Any other exception is a bug: the log has it under an id, and the
client gets only the id. `tercet.server.rpc` turns them into the status of a call.
"""

import logging
import secrets
from typing import ClassVar

import grpc
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
    content = text.encode(errors="replace")
    if len(content) <= max_bytes:
        return text
    return f"{content[: max_bytes * 2 // 3].decode(errors='ignore')} ... {content[-max_bytes // 3 :].decode(errors='ignore')}"


class StartupError(Exception):
    """The service cannot start with these settings or files. The message is for the operator."""


class ServiceError(Exception):
    """An error that is reported to the client; `code` is its gRPC status code.

    `detail` is a google.rpc message that tells a program what the text tells a person, or None.
    """

    code: ClassVar[grpc.StatusCode]

    def __init_subclass__(cls, code: grpc.StatusCode) -> None:
        cls.code = code

    def __init__(self, message: str, detail: Message | None = None) -> None:
        super().__init__(shorten(message, MAX_MESSAGE_BYTES))
        self.detail = detail

    def status(self) -> Status:
        """Return code, message and detail as google.rpc.Status."""
        status = Status(code=self.code.value[0], message=str(self))
        if self.detail:
            status.details.add().Pack(self.detail)
        return status


class InvalidInputError(ServiceError, code=grpc.StatusCode.INVALID_ARGUMENT):
    """The request does not match the contract; `field` is the path of the wrong part."""

    def __init__(self, field: str, description: str) -> None:
        self.field, text = shorten(field, MAX_FIELD_BYTES), shorten(description, MAX_MESSAGE_BYTES)
        violation = BadRequest.FieldViolation(field=self.field, description=text)
        super().__init__(f"{field}: {description}", BadRequest(field_violations=[violation]))


class ModelNotFoundError(ServiceError, code=grpc.StatusCode.NOT_FOUND):
    """There is no model of this name, or not in this version."""


class ModelUnavailableError(ServiceError, code=grpc.StatusCode.UNAVAILABLE):
    """The model exists, but is not trained or not loaded."""


class ModelRefusedError(ServiceError, code=grpc.StatusCode.FAILED_PRECONDITION):
    """The files in a model's folder did not pass verification."""


class QueueFullError(ServiceError, code=grpc.StatusCode.RESOURCE_EXHAUSTED):
    """The queue has no room for the rows of this request."""

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        text = f"the queue is full: {waiting} of at most {limit} rows are waiting; retry in {retry_after:g} s"
        super().__init__(text, RetryInfo(retry_delay=Duration(seconds=int(retry_after), nanos=int(retry_after % 1 * 1e9))))


class DeadlineExceededError(ServiceError, code=grpc.StatusCode.DEADLINE_EXCEEDED):
    """The client's deadline, or the time that the queue allows, passed before the request was started."""


class UnauthenticatedError(ServiceError, code=grpc.StatusCode.UNAUTHENTICATED):
    """The credentials are missing or wrong."""


class ShuttingDownError(ServiceError, code=grpc.StatusCode.UNAVAILABLE):
    """The service accepts no more requests."""

    def __init__(self, message: str = "the service is shutting down; retry with another instance") -> None:
        super().__init__(message)


class InternalError(ServiceError, code=grpc.StatusCode.INTERNAL):
    """A bug, or an engine that failed. The text is fixed; its id leads to the log record that has the cause."""

    def __init__(self, cause: BaseException) -> None:
        error = f"internal error {secrets.token_hex(6)}"
        super().__init__(f"{error}; the service's log has the cause under this id")
        log.error(error, exc_info=cause)
