"""What every servicer works with."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tercet.server.repository import Repository
from tercet.server.rpc import Calls
from tercet.server.telemetry import Telemetry


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
