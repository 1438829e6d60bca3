"""Services on separate hosts (network namespaces on a bridge): what a client does when one of them vanishes."""

import asyncio
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import click
import pytest
from tercet.client import Client

from benchmarks.balancers import Direct, Service, answered, leave_network, new_host

CALLS = 20


def vanish(models: Path) -> None:
    """Disconnect one of two services until the calls sent to it have been answered, then connect it again."""
    leave_network()
    with ExitStack() as stack:
        services = [Service(new_host(number), models) for number in (1, 2)]
        for service in services:
            stack.callback(service.stop)
        client = stack.enter_context(Client(Direct(services).address, balanced=True))
        threads = stack.enter_context(ThreadPoolExecutor(CALLS))

        def ask() -> list[str]:
            return [str(words[0]) for words in threads.map(client.answer, [[7]] * CALLS)]

        while not asyncio.run(answered(services[0])):
            ask()
        services[0].host.connect("down")
        assert ask() == ["7"] * CALLS  # half of them were first sent to the disconnected host
        services[0].host.connect("up")
        before = asyncio.run(answered(services[0]))
        while asyncio.run(answered(services[0])) == before:
            assert ask() == ["7"] * CALLS


@pytest.mark.slow
def test_a_host_that_vanishes(workspace: Path) -> None:
    """Calls to a host that was disconnected without a FIN are answered by another in time; once it is back, it gets calls again."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        pytest.skip("network namespaces need root, ip, nsenter and unshare")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            process.submit(vanish, workspace / "models").result()
        except click.ClickException as error:
            pytest.skip(error.message)
