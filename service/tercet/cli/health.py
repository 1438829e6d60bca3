"""Health probe for containers and init systems: `python -m tercet.cli.health HOST:PORT [NAME]` exits with 0 when SERVING.

NAME is a model, or `workers`; without one the whole service is meant. TLS is as for `tercet predict`: TERCET_TLS_CA,
TERCET_CLIENT_CERTIFICATE and TERCET_CLIENT_KEY name files.
"""

import os
import sys
from pathlib import Path

import grpc

from tercet.client import Client

TIMEOUT = 4.0  # seconds
FILES = ("TERCET_TLS_CA", "TERCET_CLIENT_CERTIFICATE", "TERCET_CLIENT_KEY")


def main(address: str, name: str = "") -> int:
    """Ask once, say what the answer is; 0 for SERVING, else 1."""
    ca, certificate, key = (Path(file) if (file := os.environ.get(variable)) else None for variable in FILES)
    try:
        with Client(address, tls_ca=ca, tls_certificate=certificate, tls_key=key, timeout=TIMEOUT) as client:
            status = client.health(name)
    except grpc.RpcError as error:
        status = f"{error.code().name}: {error.details()}"
    print(status)
    return int(status != "SERVING")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
