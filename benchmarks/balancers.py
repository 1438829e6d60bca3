"""Two services behind HAProxy, behind nginx and behind neither, while things go wrong, with trained models.

    python -m benchmarks.balancers              # on this host
    python -m benchmarks.balancers --hosts      # each on a host of its own: network namespaces on a bridge; Linux, as root

Each way (a balancer with its file in deploy/ except for the addresses; or `client`, with our client's options for several hosts) is
tried with each fault. The load is of small requests and of some larger than HAProxy's buffer; half of its callers have our client's
retry policy. After a third of the run one of the two services fails, after two thirds it recovers:

    none      nothing
    kill -9   the process is gone; its kernel refuses connections
    kills     the same, and it is started again; every 2 s
    SIGTERM   it drains and exits
    SIGSTOP   it accepts connections and does not answer, as a host that hangs
    throttled it runs a fifth of the time
    drained   the balancer stops sending it new calls; a second later SIGTERM
    cut off   the link of its host is down: packets are lost without a notice (`--hosts`)

`lost`: calls that ended with an error, without and with the retry policy. `wrong`: answers that differ from the card's. `normal`:
seconds from the last failure of the service until the last call that was lost or took over a second had ended. `back`: requests of
the first model that the service answered after it recovered.
"""

import asyncio
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import grpc
import numpy as np
from tercet.card import Card, read_card
from tercet.client import BALANCED, OPTIONS
from tercet.proto.inference_pb2 import ModelInferRequest, ModelStatisticsRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.load import Tally, build_request, free_port, is_correct, serve

ROOT = Path(__file__).parents[1]
FAULTS = ("none", "kill -9", "kills", "SIGTERM", "SIGSTOP", "throttled", "drained", "cut off")
WAYS = ("haproxy", "nginx", "client")
LOADS = (("fizzbuzz", 1), ("mnist", 32))  # 32 pictures are 25 KB
CALLERS = 4  # of each kind
PAUSE_SECONDS, DEADLINE_SECONDS = 0.01, 30.0  # between the calls of a caller; of a call
LATE_SECONDS = 1.0
CLONE_NEWNET = 0x40000000  # os.CLONE_NEWNET, from Python 3.12 on


@dataclass
class CallerTally(Tally):
    """Counts the outcomes of the calls of one kind of caller."""

    late: list[float] = field(default_factory=list)  # when calls ended that were lost or late


@dataclass
class Host:
    """Where a program runs: this host, or a network namespace that a prefix of the command enters."""

    address: str = "127.0.0.1"
    prefix: Sequence[str] = ()
    port: str = ""  # of the bridge

    def connect(self, state: Literal["up", "down"]) -> None:
        """Set the link of a namespace up or down. Raises CalledProcessError for this host."""
        ip(f"link set {self.port} {state}")


def new_host(number: int) -> Host:
    """Add a network namespace to the bridge. It exists as long as `cat` runs there, which ends with this process."""
    holder = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    process = subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
    if not (process.stdout and process.stdout.readline()):
        raise click.ClickException("unshare made no network namespace")
    host = Host(f"10.0.0.{number}", ("nsenter", f"--net=/proc/{process.pid}/ns/net"), f"port{number}")
    ip(f"link add {host.port} type veth peer name eth0 netns {process.pid}")
    ip(f"link set {host.port} master hosts up")
    for command in ("link set lo up", f"address add {host.address}/24 dev eth0", "link set eth0 up"):
        ip(command, host.prefix)
    return host


def ip(command: str, prefix: Sequence[str] = ()) -> None:
    """Run `ip`. Raises CalledProcessError."""
    subprocess.run([*prefix, "ip", *command.split()], check=True)  # noqa: S603


def leave_network() -> None:
    """Move this process from the machine's network to a bridge that ends with it. Raises ClickException without permission."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNET):
        raise click.ClickException("--hosts makes network namespaces: it needs Linux and root")
    for command in ("link set lo up", "link add hosts type bridge", "address add 10.0.0.254/24 dev hosts", "link set hosts up"):
        ip(command)


class Service:
    """A service that always starts on the same port."""

    def __init__(self, host: Host, models: Path) -> None:
        self.host, port = host, free_port()
        self.address = f"{host.address}:{port}"
        flags = ("--device=cpu", "--insecure", f"--host={host.address}", f"--port={port}")
        self._command = [*host.prefix, *serve(*flags, models=models)]
        self.start()

    def start(self) -> None:
        """Start it; return when it accepts calls. Raises RuntimeError when it does not start."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603
        if not (self.process.stdout and self.process.stdout.readline()):
            raise RuntimeError(f"{' '.join(self._command)} did not start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Direct:
    """No balancer: the client balances between the services."""

    options: Mapping[str, Any] = BALANCED

    def __init__(self, services: Sequence[Service]) -> None:
        self.address = f"ipv4:{','.join(service.address for service in services)}"

    def accept(self, service: Service, *, new_calls: bool) -> None:
        """Do nothing: the client watches health."""

    def stop(self) -> None:
        """Do nothing: no process was started."""


class Balancer(Direct):
    """A balancer with its file in deploy/, for these services."""

    options = OPTIONS

    def __init__(self, name: str, host: Host, services: Sequence[Service], folder: Path) -> None:
        """Start it. Raises OSError, and RuntimeError when it does not start."""
        self._name, self._folder, self._file = name, folder, folder / "balancer"
        text = (ROOT / "deploy" / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[name]).read_text()
        self.address = f"{host.address}:{free_port()}"
        ports = {8080: self.address, **{8001 + i: service.address for i, service in enumerate(services)}}
        text = re.sub(r"127\.0\.0\.1:(\d+)", lambda match: ports[int(match[1])], text)
        self._file.write_text(text.replace("/run/", f"{folder}/"))
        flags = {"haproxy": ["-db", "-f"], "nginx": ["-g", "daemon off;", "-c"]}[name]
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") or name
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen([*host.prefix, program, *flags, str(self._file)], stdout=log, stderr=log)  # noqa: S603
        with grpc.insecure_channel(self.address) as channel:
            try:
                grpc.channel_ready_future(channel).result(10)
            except grpc.FutureTimeoutError:
                self.stop()
                raise RuntimeError(f"{name} did not start: {(folder / 'log').read_text()}") from None

    def accept(self, service: Service, *, new_calls: bool) -> None:
        """Send a service new calls, or none; calls in flight go on."""
        if self._name == "haproxy":
            with socket.socket(socket.AF_UNIX) as admin:
                admin.connect(str(self._folder / "haproxy-tercet.sock"))
                admin.sendall(f"set server tercet/a state {'ready' if new_calls else 'drain'}\n".encode())
                admin.recv(1)
        else:
            entry, text = f"server {service.address}", self._file.read_text()
            self._file.write_text(text.replace(f"{entry} down", entry) if new_calls else text.replace(entry, f"{entry} down"))
            self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


async def call(stub: Any, request: ModelInferRequest, card: Card, tally: CallerTally, end: float) -> None:
    """Send one call after the other until `end`."""
    while (start := time.perf_counter()) < end:
        try:
            response = await stub.ModelInfer(request, timeout=DEADLINE_SECONDS)
        except grpc.RpcError as error:
            tally.lost[f"{error.code().name}: {error.details()}"] += 1
            tally.late.append(time.perf_counter())
        else:
            now = time.perf_counter()
            tally.seconds.append(now - start)
            tally.late += [now] * (now - start > LATE_SECONDS)
            tally.wrong += not is_correct(response, card, request.inputs[0].shape[0])
        await asyncio.sleep(PAUSE_SECONDS)


async def inflict(fault: str, service: Service, way: Direct, seconds: float, times: list[float]) -> None:
    """Inflict a fault on a service for `seconds`, record when, and let it recover."""
    if fault == "kills":
        for _ in range(int(seconds / 2)):
            await inflict("kill -9", service, way, 0, times)
            await asyncio.sleep(2)
        return
    process = service.process
    times.append(time.perf_counter())
    if fault == "throttled":
        for _ in range(int(seconds / 0.1)):
            for number, share in ((signal.SIGSTOP, 0.08), (signal.SIGCONT, 0.02)):
                process.send_signal(number)
                await asyncio.sleep(share)
        return
    if fault == "cut off":
        service.host.connect("down")
        await asyncio.sleep(seconds)
        service.host.connect("up")
        return
    if fault == "drained":
        way.accept(service, new_calls=False)
        await asyncio.sleep(1)
    process.send_signal({"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}.get(fault, signal.SIGTERM))
    await asyncio.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    if fault != "SIGSTOP":
        await asyncio.to_thread(process.wait)
        await asyncio.to_thread(service.start)
    if fault == "drained":
        way.accept(service, new_calls=True)


@dataclass
class Outcome:
    """The outcome of a run."""

    plain: CallerTally = field(default_factory=CallerTally)
    retrying: CallerTally = field(default_factory=CallerTally)
    faults: list[float] = field(default_factory=list)  # when each began
    back: int = 0

    def row(self) -> str:
        """Format a row of the table, without its name."""
        latencies = self.plain.seconds + self.retrying.seconds
        p50, p99, maximum = np.percentile(latencies, [50, 99, 100]) * 1e3
        lost = [sum(tally.lost.values()) for tally in (self.plain, self.retrying)]
        late = self.plain.late + self.retrying.late
        normal = max((min((end - fault for fault in self.faults if fault <= end), default=0) for end in late), default=0)
        calls = f"{len(latencies) + sum(lost):6} {self.plain.wrong + self.retrying.wrong:6}"
        return f"{calls} {lost[0]:12} {lost[1]:12} {p50:8.1f} {p99:8.1f} {maximum:8.0f} {normal:9.1f} {self.back:6}"


async def answered(service: Service) -> int:
    """Return how many requests of the first model a service has answered."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        request = ModelStatisticsRequest(name=LOADS[0][0])
        response = await GRPCInferenceServiceStub(channel).ModelStatistics(request, timeout=DEADLINE_SECONDS, wait_for_ready=True)
    return int(response.model_stats[0].inference_stats.success.count)


async def run(way: Direct, services: Sequence[Service], models: Path, fault: str, seconds: float) -> Outcome:
    """Run the load with one fault."""
    outcome, end = Outcome(), time.perf_counter() + seconds
    without_retries = json.loads(way.options["grpc.service_config"])
    del without_retries["methodConfig"]
    async with asyncio.TaskGroup() as tasks:
        for tally, changes in ((outcome.plain, {"grpc.service_config": json.dumps(without_retries)}), (outcome.retrying, {})):
            options = {**way.options, **changes, "grpc.use_local_subchannel_pool": 1}
            stub = GRPCInferenceServiceStub(grpc.aio.insecure_channel(way.address, list(options.items())))
            for model, rows in LOADS:
                card = read_card(models / model)
                for _ in range(CALLERS // len(LOADS)):
                    tasks.create_task(call(stub, build_request(card, rows), card, tally, end))
        await asyncio.sleep(seconds / 3)
        if fault != "none":
            await inflict(fault, services[0], way, seconds / 3, outcome.faults)
        before = await answered(services[0])
    outcome.back = await answered(services[0]) - before
    return outcome


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("ways", nargs=-1, type=click.Choice(WAYS))
@click.option("--seconds", default=30.0, help="Length of a run.")
@click.option("--models", type=Path, default=ROOT / "models", help="Folder of trained models.")
@click.option("--fault", "faults", multiple=True, type=click.Choice(FAULTS), default=FAULTS[:-1], help="What goes wrong.")
@click.option("--hosts", is_flag=True, help="Each on a host of its own.")
@click.option("--errors", is_flag=True, help="Print the errors of the lost calls.")
def main(ways: Sequence[str], seconds: float, models: Path, faults: Sequence[str], *, hosts: bool, errors: bool) -> None:
    """Try the WAYS (default: all) with each fault."""
    if "cut off" in faults and not hosts:
        raise click.UsageError("the fault `cut off` needs --hosts")
    if hosts:
        leave_network()
    places = [new_host(number) if hosts else Host() for number in (1, 2, 3)]
    print(f"{'':8} {'fault':10}  calls  wrong  lost, plain  lost, retry   p50 ms   p99 ms   max ms  normal s   back")
    for name in ways or WAYS:
        for fault in faults:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                services = [Service(place, models) for place in places[:2]]
                for service in services:
                    stack.callback(service.stop)
                way = Direct(services) if name == "client" else Balancer(name, places[2], services, folder)
                stack.callback(way.stop)
                outcome = asyncio.run(run(way, services, models, fault, seconds))
            print(f"{name:8} {fault:10} {outcome.row()}", flush=True)
            if errors:
                print(
                    "".join(f"    {count} x {text}\n" for text, count in (outcome.plain.lost + outcome.retrying.lost).items()),
                    end="",
                )


if __name__ == "__main__":
    main()
