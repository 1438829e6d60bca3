"""Everything that can be set, as one frozen value; each field is a flag of `tercet serve` and a TERCET_* variable."""

from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any

from tercet.errors import StartupError

INT = 2**31 - 1  # gRPC's settings are C ints
PORT = 2**16 - 1


def option(default: Any, text: str, *, choices: tuple[str, ...] = (), minimum: float = -inf, maximum: float = inf) -> Any:
    """A field with the help text of its flag, and the values that it may have."""
    return field(default=default, metadata={"help": text, "choices": choices, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a service. Raises StartupError for a value that cannot be."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8001, "Port to listen on; 0 takes a free one and prints it.", minimum=0, maximum=PORT)
    models: Path = option(Path("models"), "Folder of trained models, one folder each.")
    engine: str = option("onnxruntime", "What runs the models: onnxruntime or torch.", choices=("onnxruntime", "torch"))
    device: str = option("auto", "cpu, cuda, or auto: cuda when there is a GPU.", choices=("auto", "cpu", "cuda"))
    workers: int = option(1, "Processes that share the port.", minimum=1, maximum=1024)
    threads: int = option(1, "Threads that the engine uses for one batch on the CPU.", minimum=1, maximum=1024)
    max_request_rows: int = option(4096, "Most rows of one request.", minimum=1, maximum=INT)
    max_batch_rows: int = option(1024, "Most rows of a batch; fewer for a model that is slow.", minimum=1, maximum=INT)
    max_queue_rows: int = option(16384, "Most rows of one model that may wait.", minimum=1, maximum=INT)
    max_delay: float = option(0.0, "Seconds that an idle engine waits for more rows to join a batch.", minimum=0)
    queue_timeout: float = option(10.0, "Seconds that a request may wait before it is refused.", minimum=0.001)
    max_message_bytes: int = option(16 * 2**20, "Largest message that is read.", minimum=1, maximum=INT)
    grace: float = option(30.0, "Seconds that requests in flight have to finish at shutdown.", minimum=0)
    metrics_port: int | None = option(
        None, "Port for Prometheus, 0 for a free one; else nothing is counted.", minimum=0, maximum=PORT
    )
    watch: float = option(1.0, "Seconds between looks at the model files; new ones are served once verified. 0: never.", minimum=0)
    trace_endpoint: str | None = option(None, "OTLP collector to send traces to, such as http://127.0.0.1:4317.")
    log_format: str = option("human", "How log lines look: human or json.", choices=("human", "json"))
    token_file: Path | None = option(None, "File with the bearer tokens that callers may send, one a line; read when it changes.")
    tls_certificate: Path | None = option(None, "PEM file with the certificate (chain) for TLS; read when it changes.")
    tls_key: Path | None = option(None, "PEM file with the certificate's key.")
    tls_client_ca: Path | None = option(None, "PEM file with the authorities whose certificates callers must show (mTLS).")
    insecure: bool = option(False, "Allow plain text where other machines can call.")  # noqa: FBT003  so is every default given
    require_signed: Path | None = option(None, "PEM file with a public ed25519 key: serve only models signed for it.")
    max_concurrent_streams: int = option(
        1024, "Most calls at a time on a connection; more wait at the client.", minimum=1, maximum=INT
    )
    max_connection_age: float = option(
        0.0, "Seconds until a connection ends gently, and a client connects anew. 0: never.", minimum=0
    )

    @property
    def address(self) -> str:
        """host:port, as gRPC writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, allowed = getattr(self, setting.name), setting.metadata
            if allowed["choices"] and value not in allowed["choices"]:
                raise StartupError(f"{setting.name}: {value!r} is not known; use {' or '.join(allowed['choices'])}")
            if isinstance(value, int | float) and not allowed["minimum"] <= value <= allowed["maximum"]:
                most = "or more" if allowed["maximum"] == inf else f"to {allowed['maximum']}"
                raise StartupError(f"{setting.name}: {value} cannot be; use {allowed['minimum']} {most}")
        if (self.tls_certificate is None) != (self.tls_key is None) or (self.tls_client_ca and not self.tls_key):
            raise StartupError("tls: --tls-certificate and --tls-key go together, and --tls-client-ca needs both")
        if self.max_queue_rows < self.max_request_rows:
            raise StartupError(
                f"max_queue_rows: {self.max_queue_rows} has no room for one request; use {self.max_request_rows} or more"
            )
