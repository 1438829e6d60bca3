"""Everything that can be set, as one frozen value; each field is a flag of `trefoil serve` and a TREFOIL_* variable."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import StartupError

ENGINES = ("onnxruntime", "torch")
DEVICES = ("auto", "cpu", "cuda")


def option(default: Any, text: str) -> Any:
    """A field with the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a service. Raises StartupError for a value that cannot be."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8001, "Port to listen on; 0 takes a free one and prints it.")
    models: Path = option(Path("models"), "Folder of trained models, one folder each.")
    engine: str = option("onnxruntime", "What runs the models: onnxruntime or torch.")
    device: str = option("auto", "cpu, cuda, or auto: cuda when there is a GPU.")
    threads: int = option(1, "Threads that the engine uses for one batch on the CPU.")
    max_request_rows: int = option(4096, "Most rows of one request.")
    max_batch_rows: int = option(256, "Most rows that the engine is given at once.")
    max_queue_rows: int = option(16384, "Most rows of one model that may wait.")
    max_delay: float = option(0.0, "Seconds that an idle engine waits for more rows to join a batch.")
    queue_timeout: float = option(10.0, "Seconds that a request may wait before it is refused.")
    max_message_bytes: int = option(16 * 2**20, "Largest message that is read.")
    grace: float = option(30.0, "Seconds that requests in flight have to finish at shutdown.")
    token_file: Path | None = option(None, "File with the bearer token that callers must send.")

    def __post_init__(self) -> None:
        for name, allowed in (("engine", ENGINES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise StartupError(f"{name}: {getattr(self, name)!r} is not known; use {' or '.join(allowed)}")
        if not 0 <= self.port < 2**16:
            raise StartupError(f"port: {self.port} is no port; use 0 to 65535")
        for name in ("threads", "max_request_rows", "max_batch_rows", "max_queue_rows", "max_message_bytes"):
            if not 1 <= getattr(self, name) < 2**31:
                raise StartupError(f"{name}: {getattr(self, name)} cannot be; use 1 to {2**31 - 1}")
        if not self.queue_timeout > 0:
            raise StartupError(f"queue_timeout: {self.queue_timeout} is too short; use more than 0 seconds")
        if self.max_queue_rows < self.max_request_rows:
            raise StartupError(
                f"max_queue_rows: {self.max_queue_rows} has no room for one request; use {self.max_request_rows} or more"
            )
        for name in ("max_delay", "grace"):
            if not getattr(self, name) >= 0:
                raise StartupError(f"{name}: {getattr(self, name)} is no duration; use 0 or more seconds")
