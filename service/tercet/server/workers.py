"""Several processes on one port: a small parent starts them, replaces what dies and drains all on SIGTERM.

    parent  --stdin: "3 of 4" whenever that changes; its end means stop-->       worker
            --stdin: "load NAME", "unload NAME": another worker was asked to-->
    parent  <--stdout: Repository.engines as JSON, once it accepts calls--       worker
            <--stdout: "! " and why it cannot start--
            <--stdout: "load NAME", "unload NAME": a client asked, and it is done--

Each worker (`python -m tercet.server.workers CONFIG`) listens with SO_REUSEPORT and has engines of its own; the kernel spreads the
connections.
Health has the name `workers`: SERVING while all of them run.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from tercet.errors import ServiceError, StartupError
from tercet.server import logs
from tercet.server.config import Config
from tercet.server.metrics import Sum, tell
from tercet.server.port import hold

log = logging.getLogger(__name__)

BACKOFF = (0.1, 10.0)  # seconds before a worker that has just started is replaced: at first, and at most, doubled each time
HEALTHY = 1.0  # seconds that a worker has to serve for its replacement to start at once


class Workers:
    """The parent's view of its workers."""

    def __init__(self, config: Config) -> None:
        """Take the port, so that it is known and all workers can share it. Raises StartupError when it is taken."""
        self._socket = hold(config)
        self.config = replace(config, port=self._socket.getsockname()[1])
        self._running: dict[int, Process] = {}
        self._counted = TemporaryDirectory(prefix="tercet-metrics-") if config.metrics_port is not None else None
        self._sum = Sum(self._counted.name) if self._counted else None
        self._stopping = asyncio.Event()
        self._unloaded: set[bytes] = set()  # models; what a worker that starts has to be told

    async def run(self, ready: Callable[[Config, Mapping[str, str]], None]) -> None:
        """Keep all workers running until SIGTERM or SIGINT, then drain them. `ready` is called once all accept calls.

        Raises StartupError when a worker does not start in the first place.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._signal, signal.SIGHUP)
        if self._sum:
            self.config = replace(self.config, metrics_port=tell(self._sum.registry, self.config))
        try:
            first = await asyncio.gather(*(self._start(index) for index in range(self.config.workers)))
            ready(self.config, first[0])
            keepers = [asyncio.create_task(self._keep(index)) for index in range(self.config.workers)]
            await self._stopping.wait()
            log.info("shutting down %d workers", len(self._running))
            self._terminate()
            await asyncio.gather(*keepers)
        finally:
            self._terminate()
            self._socket.close()
            if self._counted:
                self._counted.cleanup()

    async def _start(self, index: int) -> dict[str, str]:
        """Start a worker; return its Repository.engines once it accepts calls. Raises StartupError when it does not."""
        command = [sys.executable, "-P", "-m", "tercet.server.workers", msgspec.json.encode(self.config, enc_hook=str).decode()]
        environment = {**os.environ, **({"PROMETHEUS_MULTIPROC_DIR": self._counted.name} if self._counted else {})}
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True, env=environment)
        self._running[index] = process
        if self._stopping.is_set():  # since it was decided to start this one
            process.terminate()
        assert process.stdout is not None  # noqa: S101  for the type checker: it is a PIPE
        line = (await process.stdout.readline()).decode().strip()
        if not line or line.startswith("! "):
            raise StartupError(line[2:] or "a worker did not start; its own message is above")
        self._tell()
        for name in self._unloaded:
            _write(process, b"unload " + name)
        return msgspec.json.decode(line, type=dict[str, str])

    async def _relay(self, process: Process) -> None:
        """Let the other workers do what a client asked one of them to do."""
        assert process.stdout is not None  # noqa: S101  for the type checker: it is a PIPE
        while line := await process.stdout.readline():
            verb, _, name = line.partition(b" ")
            (self._unloaded.add if verb == b"unload" else self._unloaded.discard)(name)
            for other in self._running.values():
                if other is not process:
                    _write(other, line)

    async def _keep(self, index: int) -> None:
        """Replace one worker whenever it dies, until the end."""
        backoff, since = 0.0, time.monotonic()
        while True:
            process = self._running[index]
            await self._relay(process)
            status = await process.wait()
            del self._running[index]
            if self._stopping.is_set():
                return
            backoff = 0.0 if time.monotonic() - since > HEALTHY else min(max(2 * backoff, BACKOFF[0]), BACKOFF[1])
            log.error("worker %d (process %d) ended with %d; the next one starts in %g s", index, process.pid, status, backoff)
            self._tell()
            if self._sum:
                self._sum.bury(process.pid)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff)
            if self._stopping.is_set():
                return
            try:
                await self._start(index)
            except StartupError as error:
                if not self._stopping.is_set():
                    log.error("worker %d: %s", index, error)  # noqa: TRY400  a sentence, not a traceback
            since = time.monotonic()

    def _tell(self) -> None:
        """Let every worker know how many there are, for its health service."""
        for process in self._running.values():
            _write(process, f"{len(self._running)} of {self.config.workers}\n".encode())

    def _terminate(self) -> None:
        """Ask every worker to drain and end."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to every worker."""
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _write(process: Process, line: bytes) -> None:
    """Tell a worker something, unless it is about to end."""
    if process.stdin and not process.stdin.is_closing():
        process.stdin.write(line)


async def serve(config: Config, ready: Callable[[Config, Mapping[str, str]], None]) -> None:
    """Serve with several workers until SIGTERM or SIGINT; see Workers.run."""
    await Workers(config).run(ready)


async def work(config: Config) -> None:
    """Be a worker: serve until SIGTERM or until the parent is gone; health follows what the parent tells."""
    from tercet.server.app import Server  # noqa: PLC0415  the parent does without

    told = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
    server = Server(config, relay=partial(print, flush=True))
    await server.start()
    print(msgspec.json.encode(server.repository.engines()).decode(), flush=True)

    async def listen() -> None:
        while line := await told.readline():
            first, *_, last = line.decode().split()
            if first in ("load", "unload"):
                with contextlib.suppress(ServiceError):  # it is in the log
                    await server.command(line.decode().strip(), relayed=True)
            else:
                await server.set_health("workers", serving=first == last)
        server.stopping.set()

    async with asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(listen())
        await server.run()
        listening.cancel()


def main() -> None:
    """Read the settings from the command line and be a worker."""
    import uvloop  # noqa: PLC0415  the parent does without

    def decode(kind: type, value: Any) -> Any:
        return kind(value)  # a Path; JSON has none

    config = msgspec.json.decode(sys.argv[1], type=Config, dec_hook=decode)
    logs.configure(config.log_format)
    try:
        uvloop.run(work(config))
    except StartupError as error:
        print("!", str(error).replace("\n", " "), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
