"""The settings: which values are accepted, and the messages for others."""

from dataclasses import fields
from typing import Any

import pytest
from tercet.errors import StartupError
from tercet.server.config import Config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"port": 80000}, "--port must be between 0 and 65535, got 80000"),
        ({"metrics_port": -1}, "--metrics-port must be between 0 and 65535, got -1"),
        ({"max_delay": -1.0}, "--max-delay must be 0 or more, got -1.0"),
        ({"queue_timeout": float("nan")}, "--queue-timeout must be 0.001 or more, got nan"),
        ({"engine": "nope"}, "--engine must be onnxruntime or torch, got 'nope'"),
        ({"max_queue_rows": 1}, "--max-queue-rows must be at least --max-request-rows, 4096, got 1"),
        ({"tls_key": "key.pem"}, "--tls-certificate and --tls-key go together, and --tls-client-ca needs both"),
    ],
)
def test_refused_values(setting: dict[str, Any], message: str) -> None:
    """The message names the option, what it accepts and what it got."""
    with pytest.raises(StartupError) as caught:
        Config(**setting)
    assert str(caught.value) == message


def test_limits_are_accepted() -> None:
    """Every option accepts its minimum, its maximum and each of its choices, and has a help text."""
    for field in fields(Config):
        metadata = field.metadata
        assert metadata["help"].endswith(".") or "example" in metadata["help"]
        for value in metadata["choices"]:
            assert getattr(Config(**{field.name: value}), field.name) == value
        for value in (metadata["minimum"], metadata["maximum"]):
            if abs(value) != float("inf") and field.name not in ("max_request_rows", "max_queue_rows"):
                assert getattr(Config(**{field.name: value}), field.name) == value


def test_address() -> None:
    """An IPv6 address is in brackets."""
    assert [Config(host=host).address for host in ("127.0.0.1", "::1")] == ["127.0.0.1:8001", "[::1]:8001"]
