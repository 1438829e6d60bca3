"""Two services behind HAProxy and behind nginx, with what goes wrong: `python benchmarks/balancers.py`, with trained models.

For each balancer, with its file in deploy/ but for the ports, and each fault, a load of small requests and of some larger than
HAProxy's buffer runs through the balancer, half of its callers with gRPC's standard retry policy. A third into the run one of
the two services is hurt, at two thirds it is well again:

    none      nothing
    kill -9   the process is gone; its kernel refuses connections
    SIGTERM   it drains and ends
    SIGSTOP   it takes connections and says nothing, as a host that has hung
    throttled it runs a fifth of the time
    drained   the balancer is told to send it nothing more; a second later SIGTERM

`lost`: calls that ended with an error, without and with the retry policy. `wrong`: answers that are not the card's.
"""

import asyncio
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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np

from proto import inference_pb2_grpc
from proto.inference_pb2 import ModelInferRequest
from service.bench import build_request
from service.card import Card, Rows, read_card
from service.engine import TOLERANCE

ROOT = Path(__file__).parents[1]
FAULTS = ("none", "kill -9", "SIGTERM", "SIGSTOP", "throttled", "drained")
LOADS = (("fizzbuzz", 1), ("mnist", 32))  # 32 pictures are 25 KB
CALLERS, PAUSE, DEADLINE = 4, 0.01, 30.0  # callers of each kind; seconds between calls, and for one
RETRY = {
    "name": [{"service": "inference.GRPCInferenceService"}],
    "retryPolicy": {
        "maxAttempts": 5,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    },
}


@dataclass
class Tally:
    """What came of the calls of one kind."""

    latencies: list[float] = field(default_factory=list)  # seconds, of the answered ones
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Service:
    """One service, on the same port whenever it is started."""

    def __init__(self, models: Path) -> None:
        self.port = free_port()
        trefoil = str(Path(sys.executable).with_name("trefoil"))
        self._command = [trefoil, "serve", "--device=cpu", f"--port={self.port}", f"--models={models}"]
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


class Balancer:
    """A balancer with its file in deploy/, for these services."""

    def __init__(self, name: str, services: Sequence[Service], folder: Path) -> None:
        """Start it. Raises OSError, and RuntimeError when it does not start."""
        self._name, self._folder, self._file = name, folder, folder / "balancer"
        text = (ROOT / "deploy" / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[name]).read_text()
        ours = {8080: free_port(), **{8001 + i: service.port for i, service in enumerate(services)}}
        text = re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda port: str(ours[int(port[0])]), text)
        self._file.write_text(text.replace("/run/", f"{folder}/"))
        self.address = f"127.0.0.1:{ours[8080]}"
        flags = {"haproxy": ["-db", "-f"], "nginx": ["-g", "daemon off;", "-c"]}[name]
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") or name
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen([program, *flags, str(self._file)], stdout=log, stderr=log)  # noqa: S603
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
                told.connect(str(self._folder / "haproxy-trefoil.sock"))
                told.sendall(f"set server trefoil/a state {'ready' if new else 'drain'}\n".encode())
                told.recv(1)
        else:
            here = f"server 127.0.0.1:{service.port}"
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
        else:
            tally.latencies.append(time.perf_counter() - begun)
            answers = np.frombuffer(response.raw_output_contents[0], card.output.dtype)
            tally.wrong += answers.size != expected.size or np.abs(answers - expected.ravel()).max() > TOLERANCE
        await asyncio.sleep(PAUSE)


async def hurt(service: Service, balancer: Balancer, fault: str, seconds: float) -> None:
    """Hurt a service for so long, and make it well again."""
    process = service.process
    if fault == "throttled":
        for _ in range(int(seconds / 0.1)):
            for number, share in ((signal.SIGSTOP, 0.08), (signal.SIGCONT, 0.02)):
                process.send_signal(number)
                await asyncio.sleep(share)
        return
    if fault == "drained":
        balancer.send(service, new=False)
        await asyncio.sleep(1)
    process.send_signal({"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}.get(fault, signal.SIGTERM))
    await asyncio.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    if fault != "SIGSTOP":
        await asyncio.to_thread(process.wait)
        await asyncio.to_thread(service.start)
    if fault == "drained":
        balancer.send(service, new=True)


async def run(balancer: Balancer, services: Sequence[Service], models: Path, fault: str, seconds: float) -> tuple[Tally, Tally]:
    """One run: what came of the calls without and with the retry policy."""
    plain, retrying = Tally(), Tally()
    end = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as tasks:
        for tally, config in ((plain, {}), (retrying, {"methodConfig": [RETRY]})):
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.service_config", json.dumps(config))]
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(grpc.aio.insecure_channel(balancer.address, options=options))
            for model, rows in LOADS:
                card = read_card(models / model)
                for _ in range(CALLERS // len(LOADS)):
                    tasks.create_task(call(stub, build_request(card, rows), card, tally, end))
        await asyncio.sleep(seconds / 3)
        if fault != "none":
            await hurt(services[0], balancer, fault, seconds / 3)
    return plain, retrying


def line(name: str, fault: str, plain: Tally, retrying: Tally) -> str:
    """A row of the table."""
    latencies = plain.latencies + retrying.latencies
    p50, p99, most = np.percentile(latencies, [50, 99, 100]) * 1e3
    lost = [sum(tally.lost.values()) for tally in (plain, retrying)]
    calls = f"{len(latencies) + sum(lost):6} {plain.wrong + retrying.wrong:6}"
    return f"{name:8} {fault:10} {calls} {lost[0]:12} {lost[1]:12} {p50:8.1f} {p99:8.1f} {most:8.0f}"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("balancers", nargs=-1, type=click.Choice(["haproxy", "nginx"]))
@click.option("--seconds", default=30.0, help="Length of a run.")
@click.option("--models", type=Path, default=ROOT / "models", help="Folder of trained models.")
@click.option("--fault", "faults", multiple=True, type=click.Choice(FAULTS), default=FAULTS, help="What goes wrong.")
@click.option("--errors", is_flag=True, help="Print what the lost calls were told.")
def main(balancers: Sequence[str], seconds: float, models: Path, faults: Sequence[str], *, errors: bool) -> None:
    """Try the BALANCERS, both unless named."""
    print(f"{'':8} {'fault':10}  calls  wrong  lost, plain  lost, retry   p50 ms   p99 ms   max ms")
    for name in balancers or ["haproxy", "nginx"]:
        for fault in faults:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                services = [Service(models) for _ in range(2)]
                for service in services:
                    stack.callback(service.stop)
                stack.callback((balancer := Balancer(name, services, folder)).stop)
                plain, retrying = asyncio.run(run(balancer, services, models, fault, seconds))
            print(line(name, fault, plain, retrying), flush=True)
            if errors:
                print("".join(f"    {count} x {text}\n" for text, count in (plain.lost + retrying.lost).items()), end="")


if __name__ == "__main__":
    main()
