"""The faces of the service, one module a .proto file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tercet.errors import Unreadable
from tercet.server.repository import Repository

Parse = Callable[[bytes], Any]


class Face:
    """What every servicer has: the models, whether new calls are welcome, and where it writes down how they went."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.metrics = repository.metrics
        self.admit = repository.admit


class Readable:
    """Stands in for a server to which faces are added: bytes that are no message reach the face as Unreadable.

    gRPC itself would answer them with UNKNOWN, and write a traceback into the log for each.
    """

    def __init__(self, server: Any, read: Callable[[Parse], Parse | None] | None = None) -> None:
        """`read` makes what reads requests of what would; without one it is `reader`, and where it gives None they stay bytes."""
        self._server, self._read = server, read or reader

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add nothing: generated code registers the same methods, next."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add the methods of a face."""
        careful = {name: had._replace(request_deserializer=self._read(had.request_deserializer)) for name, had in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, careful),))
        self._server.add_registered_method_handlers(service, careful)


def reader(parse: Parse) -> Parse:
    """`parse`, with an answer for what it cannot read."""

    def read(content: bytes) -> Any:
        try:
            return parse(content)
        except DecodeError as error:
            return Unreadable(str(error))

    return read
