"""The faces of the service, one module a .proto file."""

from service.repository import Repository


class Face:
    """What every servicer has: the models, whether new calls are welcome, and where it writes down how they went."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.metrics = repository.metrics
        self.admit = repository.admit
