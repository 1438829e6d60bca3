"""Two services behind HAProxy, behind nginx and behind neither, with what goes wrong, for trained models.

    python benchmarks/balancers.py              # on this host
    python benchmarks/balancers.py --hosts      # each on a host of its own: network namespaces on a bridge; Linux, as root

For each way, the balancers with their files in deploy/ but for the addresses, `client` with our client's options for several hosts,
and each fault, a load of small requests and of some larger than HAProxy's buffer runs, half of its callers with our client's
retry policy. A third into the run one of the two services is hurt, at two thirds it is well again:

    none      nothing
    kill -9   the process is gone; its kernel refuses connections
    kills     the same, and it is started again; every 2 s
    SIGTERM   it drains and ends
    SIGSTOP   it takes connections and says nothing, as a host that has hung
    throttled it runs a fifth of the time
    drained   the balancer is told to send it nothing more; a second later SIGTERM
    cut off   its host's link is down: what is sent is lost, and nobody is told (`--hosts`)

`lost`: calls that ended with an error, without and with the retry policy. `wrong`: answers that are not the card's. `normal`:
seconds after the service was last hurt until the last call that was lost or took over a second had ended. `back`: requests of the
first model that the service answered once it was well again.
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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import grpc
import numpy as np
from tercet.card import Card, Rows, read_card
from tercet.client import BALANCED, OPTIONS
from tercet.proto import inference_pb2_grpc
from tercet.proto.inference_pb2 import ModelInferRequest, ModelStatisticsRequest
from tercet.server.engine import TOLERANCE

from benchmarks.load import build_request

ROOT = Path(__file__).parents[1]
FAULTS = ("none", "kill -9", "kills", "SIGTERM", "SIGSTOP", "throttled", "drained", "cut off")
WAYS = ("haproxy", "nginx", "client")
LOADS = (("fizzbuzz", 1), ("mnist", 32))  # 32 pictures are 25 KB
CALLERS, PAUSE, DEADLINE = 4, 0.01, 30.0  # callers of each kind; seconds between calls, and for one
LATE = 1.0  # seconds
NEW_NETWORK = 0x40000000  # CLONE_NEWNET, which Python 3.12 knows


@dataclass
class Tally:
    """What came of the calls of one kind."""

    latencies: list[float] = field(default_factory=list)  # seconds, of the answered ones
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    late: list[float] = field(default_factory=list)  # when those ended that were lost or took long


@dataclass
class Host:
    """Where a program runs; here, unless it says how a command begins that runs elsewhere."""

    address: str = "127.0.0.1"
    inside: Sequence[str] = ()
    port: str = ""  # of the bridge

    def connect(self, state: Literal["up", "down"]) -> None:
        """Plug its cable in, or pull it. Raises CalledProcessError for the host that everybody is on."""
        ip(f"link set {self.port} {state}")


def new_host(number: int) -> Host:
    """A host on the bridge: a network namespace that lasts for as long as `cat` runs there, which ends with this process."""
    holder = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    process = subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
    if not (process.stdout and process.stdout.readline()):
        raise click.ClickException("unshare made no network namespace")
    host = Host(f"10.0.0.{number}", ("nsenter", f"--net=/proc/{process.pid}/ns/net"), f"port{number}")
    ip(f"link add {host.port} type veth peer name eth0 netns {process.pid}")
    ip(f"link set {host.port} master hosts up")
    for command in ("link set lo up", f"address add {host.address}/24 dev eth0", "link set eth0 up"):
        ip(command, host.inside)
    return host


def ip(command: str, inside: Sequence[str] = ()) -> None:
    """Set up a network. Raises CalledProcessError."""
    subprocess.run([*inside, "ip", *command.split()], check=True)  # noqa: S603


def leave_network() -> None:
    """Take this process out of the machine's network, onto a bridge that ends with it. Raises ClickException where it may not."""
    if ctypes.CDLL(None).unshare(NEW_NETWORK):
        raise click.ClickException("--hosts makes network namespaces: it needs Linux and root")
    for command in ("link set lo up", "link add hosts type bridge", "address add 10.0.0.254/24 dev hosts", "link set hosts up"):
        ip(command)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Service:
    """One service, on the same port whenever it is started."""

    def __init__(self, host: Host, models: Path) -> None:
        self.host, port = host, free_port()
        self.address = f"{host.address}:{port}"
        tercet = [str(Path(sys.executable).with_name("tercet")), "serve", "--device=cpu", "--insecure"]
        self._command = [*host.inside, *tercet, f"--host={host.address}", f"--port={port}", f"--models={models}"]
        self.start()

    def start(self) -> None:
        """Start it; return when it takes calls. Raises RuntimeError when it does not."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603
        if not (self.process.stdout and self.process.stdout.readline()):
            raise RuntimeError(f"{' '.join(self._command)} did not start")

    def stop(self) -> None:
        """End it for good."""
        self.process.kill()
        self.process.wait()


class Direct:
    """No balancer: the client goes round the services."""

    options: Mapping[str, Any] = BALANCED

    def __init__(self, services: Sequence[Service]) -> None:
        self.address = f"ipv4:{','.join(service.address for service in services)}"

    def send(self, service: Service, *, new: bool) -> None:
        """Nobody is to be told."""

    def stop(self) -> None:
        """Nothing is to be stopped."""


class Balancer(Direct):
    """A balancer with its file in deploy/, for these services."""

    options = OPTIONS

    def __init__(self, name: str, host: Host, services: Sequence[Service], folder: Path) -> None:
        """Start it. Raises OSError, and RuntimeError when it does not start."""
        self._name, self._folder, self._file = name, folder, folder / "balancer"
        text = (ROOT / "deploy" / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[name]).read_text()
        self.address = f"{host.address}:{free_port()}"
        ours = {8080: self.address, **{8001 + i: service.address for i, service in enumerate(services)}}
        text = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: ours[int(found[1])], text)
        self._file.write_text(text.replace("/run/", f"{folder}/"))
        flags = {"haproxy": ["-db", "-f"], "nginx": ["-g", "daemon off;", "-c"]}[name]
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") or name
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen([*host.inside, program, *flags, str(self._file)], stdout=log, stderr=log)  # noqa: S603
        with grpc.insecure_channel(self.address) as channel:
            try:
                grpc.channel_ready_future(channel).result(10)
            except grpc.FutureTimeoutError:
                self.stop()
                raise RuntimeError(f"{name} did not start: {(folder / 'log').read_text()}") from None

    def send(self, service: Service, *, new: bool) -> None:
        """Send a service new calls, or none; those that it has go on."""
        if self._name == "haproxy":
            with socket.socket(socket.AF_UNIX) as told:
                told.connect(str(self._folder / "haproxy-tercet.sock"))
                told.sendall(f"set server tercet/a state {'ready' if new else 'drain'}\n".encode())
                told.recv(1)
        else:
            here = f"server {service.address}"
            text = self._file.read_text()
            self._file.write_text(text.replace(f"{here} down", here) if new else text.replace(here, f"{here} down"))
            self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


async def call(stub: Any, request: ModelInferRequest, card: Card, tally: Tally, end: float) -> None:
    """One caller: a call after the other until the end."""
    rows = request.inputs[0].shape[0]
    expected: Rows = np.resize(np.array([example.output for example in card.examples]), (rows, *card.output.shape))
    while (begun := time.perf_counter()) < end:
        try:
            response = await stub.ModelInfer(request, timeout=DEADLINE)
        except grpc.RpcError as error:
            tally.lost[f"{error.code().name}: {error.details()}"] += 1
            tally.late.append(time.perf_counter())
        else:
            ended = time.perf_counter()
            tally.latencies.append(ended - begun)
            tally.late += [ended] * (ended - begun > LATE)
            answers = np.frombuffer(response.raw_output_contents[0], card.output.dtype)
            tally.wrong += answers.size != expected.size or np.abs(answers - expected.ravel()).max() > TOLERANCE
        await asyncio.sleep(PAUSE)


async def hurt(service: Service, way: Direct, fault: str, seconds: float, times: list[float]) -> None:
    """Hurt a service for so long, note when, and make it well again."""
    if fault == "kills":
        for _ in range(int(seconds / 2)):
            await hurt(service, way, "kill -9", 0, times)
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
        way.send(service, new=False)
        await asyncio.sleep(1)
    process.send_signal({"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}.get(fault, signal.SIGTERM))
    await asyncio.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    if fault != "SIGSTOP":
        await asyncio.to_thread(process.wait)
        await asyncio.to_thread(service.start)
    if fault == "drained":
        way.send(service, new=True)


@dataclass
class Outcome:
    """What came of a run."""

    plain: Tally = field(default_factory=Tally)
    retrying: Tally = field(default_factory=Tally)  # with the retry policy
    hurt: list[float] = field(default_factory=list)  # when
    back: int = 0

    def row(self) -> str:
        """A row of the table, but for its name."""
        latencies = self.plain.latencies + self.retrying.latencies
        p50, p99, most = np.percentile(latencies, [50, 99, 100]) * 1e3
        lost = [sum(tally.lost.values()) for tally in (self.plain, self.retrying)]
        late = [min((end - hurt for hurt in self.hurt if hurt <= end), default=0) for end in self.plain.late + self.retrying.late]
        calls = f"{len(latencies) + sum(lost):6} {self.plain.wrong + self.retrying.wrong:6}"
        times = f"{p50:8.1f} {p99:8.1f} {most:8.0f} {max(late, default=0):9.1f}"
        return f"{calls} {lost[0]:12} {lost[1]:12} {times} {self.back:6}"


async def answered(service: Service) -> int:
    """How many requests of the first model a service has answered."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        found = await stub.ModelStatistics(ModelStatisticsRequest(name=LOADS[0][0]), timeout=DEADLINE, wait_for_ready=True)
    return int(found.model_stats[0].inference_stats.success.count)


async def run(way: Direct, services: Sequence[Service], models: Path, fault: str, seconds: float) -> Outcome:
    """One run."""
    outcome = Outcome()
    end = time.perf_counter() + seconds
    config = json.loads(way.options["grpc.service_config"])
    del config["methodConfig"]
    async with asyncio.TaskGroup() as tasks:
        for tally, changed in ((outcome.plain, {"grpc.service_config": json.dumps(config)}), (outcome.retrying, {})):
            options = {**way.options, **changed, "grpc.use_local_subchannel_pool": 1}
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(grpc.aio.insecure_channel(way.address, list(options.items())))
            for model, rows in LOADS:
                card = read_card(models / model)
                for _ in range(CALLERS // len(LOADS)):
                    tasks.create_task(call(stub, build_request(card, rows), card, tally, end))
        await asyncio.sleep(seconds / 3)
        if fault != "none":
            await hurt(services[0], way, fault, seconds / 3, outcome.hurt)
        outcome.back -= await answered(services[0])
    outcome.back += await answered(services[0])
    return outcome


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("ways", nargs=-1, type=click.Choice(WAYS))
@click.option("--seconds", default=30.0, help="Length of a run.")
@click.option("--models", type=Path, default=ROOT / "models", help="Folder of trained models.")
@click.option("--fault", "faults", multiple=True, type=click.Choice(FAULTS), default=FAULTS[:-1], help="What goes wrong.")
@click.option("--hosts", is_flag=True, help="Each on a host of its own.")
@click.option("--errors", is_flag=True, help="Print what the lost calls were told.")
def main(ways: Sequence[str], seconds: float, models: Path, faults: Sequence[str], *, hosts: bool, errors: bool) -> None:
    """Try the WAYS, all unless named."""
    if "cut off" in faults and not hosts:
        raise click.UsageError("only --hosts can be cut off")
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
                told = outcome.plain.lost + outcome.retrying.lost
                print("".join(f"    {count} x {text}\n" for text, count in told.items()), end="")


if __name__ == "__main__":
    main()
