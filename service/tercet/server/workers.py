"""Several processes on one port: a small parent starts them, replaces those that die, and drains all on SIGTERM.

    parent --stdin: "3 of 4" when the number of running workers changes; end of file means stop--> worker
           --stdin: "load NAME", "unload NAME": a client asked another worker for it-->
           <--stdout: Repository.engines as JSON, once it accepts calls--
           <--stdout: "! " and the reason why it cannot start--
           <--stdout: "load NAME", "unload NAME": done as a client asked--

Each worker (`python -m tercet.server.workers CONFIG FILE`) listens with SO_REUSEPORT and has its own engines; the kernel spreads
the connections. The health service reports SERVING for the name `workers` while all of them run.
"""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from tempfile import TemporaryFile
from typing import Any

import msgspec

from tercet.errors import ServiceError, StartupError
from tercet.server.config import Config
from tercet.server.security import reserve_port
from tercet.server.telemetry import MetricMemory, configure_logging, start_metrics_server

log = logging.getLogger(__name__)

RESTART_SECONDS = 1.0  # pause before a worker that died within this time is replaced: it would take the CPU from the others


class Workers:
    """The workers, as the parent sees them."""

    def __init__(self, config: Config) -> None:
        """Reserve the port. Raises StartupError when it or the one for metrics is taken."""
        self._socket = reserve_port(config)
        self._running: dict[int, Any] = {}  # Process, without the assertions that its pipes are there
        self._stopping = asyncio.Event()
        self._unloaded: set[bytes] = set()  # names of models, for workers that start later
        self._files = [TemporaryFile() for _ in range(config.workers)]  # noqa: SIM115  open as long as this process
        self._memories = [MetricMemory(file.fileno()) for file in self._files]
        self._restarts = (memory := MetricMemory()).values("tercet_worker_restarts_total")
        port = self._socket.getsockname()[1]
        self.config = start_metrics_server(replace(config, port=port), [memory, *self._memories])

    async def run(self, ready: Callable[[Config, Mapping[str, str]], None]) -> None:
        """Keep all workers running until SIGTERM or SIGINT, then drain them. `ready` is called once all accept calls.

        Raises StartupError when a worker does not start the first time.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._signal, signal.SIGHUP)
        try:
            engines = await asyncio.gather(*(self._start(index) for index in range(self.config.workers)))
            ready(self.config, engines[0])
            keepers = [asyncio.create_task(self._keep_running(index)) for index in range(self.config.workers)]
            await self._stopping.wait()
            log.info("shutting down %d workers", len(self._running))
        finally:
            self._signal(signal.SIGTERM)
        await asyncio.gather(*keepers)

    async def _start(self, index: int) -> dict[str, str]:
        """Start a worker; return its Repository.engines once it accepts calls. Raises StartupError when it does not."""
        config, file = msgspec.json.encode(self.config, enc_hook=str), self._files[index].fileno()
        command: list[Any] = [sys.executable, "-P", "-m", "tercet.server.workers", config, str(file)]
        process: Any = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, start_new_session=True, pass_fds=[file]
        )
        self._running[index] = process
        if self._stopping.is_set():  # SIGTERM came while it was created
            process.terminate()
        line = (await process.stdout.readline()).decode().strip()
        if not line or line.startswith("! "):
            raise StartupError(line[2:] or "a worker did not start; its own message is above")
        self._broadcast_worker_count()
        for name in self._unloaded:
            _write(b"unload " + name, [process])
        return msgspec.json.decode(line, type=dict[str, str])

    async def _keep_running(self, index: int) -> None:
        """Replace a worker whenever it dies, until shutdown."""
        while True:
            started, process = time.monotonic(), self._running[index]
            await self._relay_commands(process)
            status = await process.wait()
            del self._running[index]
            if self._stopping.is_set():
                return
            log.error("worker %d (process %d) ended with %d; replacing it", index, process.pid, status)
            self._restarts[0] += 1
            self._memories[index].clear_gauges()
            self._broadcast_worker_count()
            with contextlib.suppress(TimeoutError):
                pause = RESTART_SECONDS if time.monotonic() - started < RESTART_SECONDS else 0
                await asyncio.wait_for(self._stopping.wait(), pause)
                return
            try:
                await self._start(index)
            except StartupError as error:
                if not self._stopping.is_set():
                    log.error("worker %d: %s", index, error)  # noqa: TRY400  the operator needs no traceback

    async def _relay_commands(self, process: Any) -> None:
        """Pass on to the other workers what a client asked one of them to do, until it ends."""
        while line := await process.stdout.readline():
            verb, _, name = line.partition(b" ")
            (self._unloaded.add if verb == b"unload" else self._unloaded.discard)(name)
            _write(line, (other for other in self._running.values() if other is not process))

    def _broadcast_worker_count(self) -> None:
        """Tell all workers how many run, for their health services."""
        _write(f"{len(self._running)} of {self.config.workers}\n".encode(), self._running.values())

    def _signal(self, number: signal.Signals) -> None:
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _write(line: bytes, processes: Iterable[Any]) -> None:
    for process in processes:
        if not process.stdin.is_closing():
            process.stdin.write(line)


async def serve(config: Config, ready: Callable[[Config, Mapping[str, str]], None]) -> None:
    """Serve with several workers until SIGTERM or SIGINT; see Workers.run."""
    await Workers(config).run(ready)


async def _work(config: Config, memory: MetricMemory) -> None:
    """Run one worker until SIGTERM, or until the parent ends."""
    from tercet.server.app import Server  # noqa: PLC0415  the parent does not need it

    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    server = Server(config, memory=memory, relay=partial(print, flush=True))
    await server.start()
    print(msgspec.json.encode(server.repository.engines()).decode(), flush=True)

    async def listen() -> None:
        while line := (await commands.readline()).decode().strip():
            if line.startswith(("load ", "unload ")):
                with contextlib.suppress(ServiceError):  # the log has it
                    await server.command(line, relayed=True)
            else:
                running, _, expected = line.split()
                await server.set_health("workers", serving=running == expected)

    listening = asyncio.create_task(listen())
    listening.add_done_callback(lambda _: server.stopping.set())
    await server.run()


def main(config_json: str, file: str) -> None:
    """Run a worker with a Config in JSON that counts its metrics in the file with this descriptor."""
    import uvloop  # noqa: PLC0415  the parent does not need it

    config = msgspec.json.decode(config_json, type=Config, dec_hook=lambda kind, value: kind(value))  # JSON has no Path
    configure_logging(config.log_format)
    try:
        uvloop.run(_work(config, MetricMemory(int(file))))
    except StartupError as error:
        print("!", str(error).replace("\n", " "), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
