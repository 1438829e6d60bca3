"""`tercet health` and `python -m tercet.cli.health` are the same probe."""

import socket
import sys

import pytest

from tests.conftest import REPOSITORY, Service, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", [["tercet", "health"], [sys.executable, "-P", "-m", "tercet.cli.health"]])
@pytest.mark.parametrize(("name", "status", "code"), [("", "SERVING", 0), ("mnist", "SERVING", 0), ("nosuch", "NOT_FOUND", 1)])
def test_health(default_service: Service, command: list[str], name: str, status: str, code: int) -> None:
    """The status is printed, and the exit code is 0 only for SERVING."""
    done = run(*command, default_service.address, *filter(None, [name]), cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout.split(":")[0].strip()) == (code, status)


def test_health_of_the_server_in_the_environment(default_service: Service) -> None:
    """Without an address TERCET_SERVER is probed."""
    assert run("tercet", "health", cwd=REPOSITORY, TERCET_SERVER=default_service.address).stdout == "SERVING\n"


def test_nothing_listens() -> None:
    """Where nothing listens the exit code is 1, and the reason is printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        done = run("tercet", "health", f"127.0.0.1:{free.getsockname()[1]}", cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("UNAVAILABLE: ")
