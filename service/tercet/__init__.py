"""Clients and server of three small PyTorch models: `tercet.Client("127.0.0.1:8001")`, or `tercet.AsyncClient` with asyncio."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.client import Client
    from tercet.client.aio import AsyncClient
    from tercet.client.codecs import Assessment, Digit, Word

__all__ = ["Assessment", "AsyncClient", "Client", "Digit", "Word"]
# onnxruntime >= 1.29 sends telemetry and keeps an id in the home directory unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:  # imports on first use, so that `import tercet` takes no time
        if name not in __all__:
            raise AttributeError(f"module 'tercet' has no attribute {name!r}")
        return getattr(import_module("tercet.client.aio" if name == "AsyncClient" else "tercet.client"), name)
