"""Ports: whether one can be listened on, in words."""

import socket
from ipaddress import ip_address
from typing import Any

from tercet.errors import StartupError
from tercet.server.config import Config


def check(config: Config) -> tuple[socket.AddressFamily, Any]:
    """The address to listen on, with a free port in place of 0.

    Raises StartupError when it is not ours or is taken, or when calls from other machines would come in plain text.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        if not (config.tls_key or config.insecure or all(ip_address(entry[4][0]).is_loopback for entry in found)):
            raise StartupError(
                f"other machines reach {config.host}, and calls would come in plain text: give --tls-certificate and --tls-key, "
                "or say --insecure when something else keeps them safe"
            )
        family, _, _, _, address = found[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)  # refused when anyone listens there, whether that one shares the port or not
            return family, probe.getsockname()
    except OSError as error:
        reason = str(error.strerror).lower()
        advice = "choose another with --port, or 0 for a free one"
        raise StartupError(f"cannot listen on {config.address}: {reason}; {advice}") from error


def hold(config: Config) -> socket.socket:
    """A socket on the port that does not listen: it keeps the port for processes that share it. Raises as `check` does."""
    family, address = check(config)
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(address)
    return held
