"""All settings, as one frozen value: each field is an option of `tercet serve` and a TERCET_* variable."""

from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any

from tercet.errors import StartupError

MAX_INT = 2**31 - 1  # gRPC's settings are C ints
MAX_PORT, MAX_SECONDS = 2**16 - 1, 10**6


def option(default: Any, text: str, *, choices: tuple[str, ...] = (), minimum: float = -inf, maximum: float = inf) -> Any:
    """A field with the help text of its option and the values that it accepts; the command line shows both."""
    return field(default=default, metadata={"help": text, "choices": choices, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a service. Raises StartupError for a value that is not accepted."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8001, "Port to listen on; 0 picks a free one and prints it.", minimum=0, maximum=MAX_PORT)
    models: Path = option(Path("models"), "Folder of trained models, one subfolder per model.")
    engine: str = option("onnxruntime", "Engine that runs the models.", choices=("onnxruntime", "torch"))
    device: str = option("auto", "Device to run on; auto is cuda when there is a GPU.", choices=("auto", "cpu", "cuda"))
    transport: str = option("grpcio", "HTTP/2 library; auto: nghttp2 if installed.", choices=("auto", "nghttp2", "grpcio"))
    workers: int = option(1, "Processes that share the port.", minimum=1, maximum=1024)
    threads: int = option(1, "Threads that the engine uses for one batch on the CPU.", minimum=1, maximum=1024)
    max_request_rows: int = option(4096, "Maximum rows per request.", minimum=1, maximum=MAX_INT)
    max_batch_rows: int = option(1024, "Maximum rows per batch; slow models get smaller batches.", minimum=1, maximum=MAX_INT)
    max_queue_rows: int = option(16384, "Maximum rows that wait per model.", minimum=1, maximum=MAX_INT)
    max_delay: float = option(0.0, "Seconds that an idle engine waits for more rows to join a batch.", minimum=0)
    queue_timeout: float = option(10.0, "Seconds that a request may wait before it is refused.", minimum=0.001)
    max_message_bytes: int = option(16 * 2**20, "Maximum size of a request message.", minimum=1, maximum=MAX_INT)
    grace: float = option(30.0, "Seconds that requests in flight have to finish at shutdown.", minimum=0, maximum=MAX_SECONDS)
    metrics_port: int | None = option(None, "Port for Prometheus metrics; 0 picks a free one.", minimum=0, maximum=MAX_PORT)
    watch: float = option(1.0, "Seconds between checks for new model files; 0 never checks.", minimum=0)
    trace_endpoint: str | None = option(None, "OTLP collector to send traces to, for example http://127.0.0.1:4317.")
    log_format: str = option("human", "Format of log lines.", choices=("human", "json"))
    token_file: Path | None = option(None, "File of accepted bearer tokens, one per line; reloaded when it changes.")
    tls_certificate: Path | None = option(None, "PEM file with the certificate (chain) for TLS; reloaded when it changes.")
    tls_key: Path | None = option(None, "PEM file with the key of the certificate.")
    tls_client_ca: Path | None = option(None, "PEM file with the CAs that client certificates must come from (mTLS).")
    insecure: bool = option(False, "Allow plain text on addresses that other machines can reach.")  # noqa: FBT003  a default
    require_signed: Path | None = option(None, "PEM file with a public ed25519 key: serve only models signed with its private key.")
    max_concurrent_streams: int = option(1024, "Maximum concurrent calls per connection.", minimum=1, maximum=MAX_INT)
    max_connection_age: float = option(0.0, "Seconds until clients have to reconnect; 0: never.", minimum=0, maximum=MAX_SECONDS)

    @property
    def address(self) -> str:
        """host:port, as gRPC writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __post_init__(self) -> None:
        for setting in fields(self):
            name, value = f"--{setting.name.replace('_', '-')}", getattr(self, setting.name)
            choices, minimum, maximum = (setting.metadata[key] for key in ("choices", "minimum", "maximum"))
            if choices and value not in choices:
                raise StartupError(f"{name} must be {' or '.join(choices)}, got {value!r}")
            if isinstance(value, int | float) and not minimum <= value <= maximum:
                expected = f"{minimum} or more" if maximum == inf else f"between {minimum} and {maximum}"
                raise StartupError(f"{name} must be {expected}, got {value}")
        if (self.tls_certificate is None) != (self.tls_key is None) or (self.tls_client_ca and not self.tls_key):
            raise StartupError("--tls-certificate and --tls-key go together, and --tls-client-ca needs both")
        if self.max_queue_rows < self.max_request_rows:
            raise StartupError(
                f"--max-queue-rows must be at least --max-request-rows, {self.max_request_rows}, got {self.max_queue_rows}"
            )
