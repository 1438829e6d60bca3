"""What one connection may do, read from gRPC's own option names, with gRPC's defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Self

DISABLED = 2**31 - 1  # gRPC's INT_MAX: never

OPTIONS = {  # gRPC's name: the field here; names that end in _ms are divided by 1,000
    "grpc.max_receive_message_length": "message_bytes",
    "grpc.absolute_max_metadata_size": "metadata_bytes",
    "grpc.max_concurrent_streams": "concurrent_streams",
    "grpc.server_handshake_timeout_ms": "handshake_seconds",
    "grpc.max_connection_idle_ms": "idle_seconds",
    "grpc.max_connection_age_ms": "age_seconds",
    "grpc.max_connection_age_grace_ms": "age_grace_seconds",
    "grpc.keepalive_time_ms": "keepalive_seconds",
    "grpc.keepalive_timeout_ms": "keepalive_timeout_seconds",
    "grpc.keepalive_permit_without_calls": "pings_without_calls",
    "grpc.http2.min_recv_ping_interval_without_data_ms": "ping_interval_seconds",
    "grpc.http2.max_ping_strikes": "ping_strikes",
    "grpc.so_reuseport": "reuse_port",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes, seconds and counts."""

    message_bytes: int = 4 * 2**20  # of a request message, after decompression
    metadata_bytes: int = 16 * 2**10  # of a call's headers; more is RESOURCE_EXHAUSTED
    concurrent_streams: int = DISABLED
    handshake_seconds: float = 120.0  # for TLS and then the HTTP/2 preface and SETTINGS, each; and for half a frame
    idle_seconds: float = inf  # without a call
    age_seconds: float = inf
    age_grace_seconds: float = inf  # that calls have to finish after it
    keepalive_seconds: float = 7200.0  # without a whole frame from the client: ping it
    keepalive_timeout_seconds: float = 20.0  # for the acknowledgement
    pings_without_calls: int = 0  # whether the client may ping as often as `ping_interval_seconds` when it has no call
    ping_interval_seconds: float = 300.0  # between a client's pings when nothing was sent to it in between
    ping_strikes: int = 2  # pings that may be too early; 0: any number
    reuse_port: int = 1
    send_seconds: float = 60.0  # that a client may take to accept the rest of an answer, or to end a request that was answered

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Self:
        """Take what is known of gRPC's options."""
        values: dict[str, Any] = {}
        for name, field in OPTIONS.items():
            if name in options:
                value, disabled = options[name], not 0 <= options[name] < DISABLED
                if name.endswith("_ms"):
                    values[field] = inf if disabled else value / 1e3
                else:
                    values[field] = DISABLED if disabled else value
        return cls(**values)

    @property
    def check_seconds(self) -> float:
        """How often the times above are checked."""
        keepalive = min(self.keepalive_seconds, self.keepalive_timeout_seconds)
        return min(1.0, max(0.01, min(self.handshake_seconds, self.idle_seconds, self.age_seconds, keepalive) / 4))
