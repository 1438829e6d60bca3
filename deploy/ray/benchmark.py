"""The service on Ray Serve, on a cluster of three nodes on this machine: `python benchmarks/ray_serve.py`, with trained models.

    pip install -c constraints.txt -e '.[serve,bench,ray]' tritonclient  # an environment of its own: docs/deploy.md says why
    PYTHONPATH=. python benchmarks/ray_serve.py --ingress haproxy

It starts the nodes with `ray start`, each with ports of its own, deploys as docs/deploy.md does, and puts HAProxy with
deploy/haproxy.cfg in front, which asks each node for its health. It prints whether tritonclient gets right answers; CPU time
a request beside the plain service's; what came of a load while replicas went from 1 to 3 and back; and what came of one while
nodes were killed. Half of the callers have our client's retry policy. README.md has what was measured, and where.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import psutil
import tritonclient.grpc as triton
from tercet.card import Card, read_card
from tercet.client import OPTIONS
from tercet.proto import inference_pb2_grpc
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.server.engine import TOLERANCE

from benchmarks.load import Load, build_request, check, drive, started, with_asyncio, with_h2load

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NODES = 3
REPLICAS = {"target_ongoing_requests": 4}  # as deploy/ray_app.py has it
LOADS = (("fizzbuzz", 1), ("fizzbuzz", 64), ("mnist", 1))
CALLS = (("fizzbuzz", 1), ("mnist", 8))  # of the callers; 8 pictures are 6 KB
INGRESS: dict[str, dict[str, str]] = {  # what Ray reads from the environment of its nodes
    "proxy": {},  # the default: a Python proxy on each node
    "fast proxy": {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    },
    "haproxy": {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # a replica that dies with a request: ask another
    },
}


STATES = """
import json, ray
from ray import serve
ray.init(log_to_driver=False, logging_level="ERROR")
print(json.dumps(serve.status().applications["default"].deployments["tercet"].replica_states))
"""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def name(process: psutil.Process) -> str:
    """What a process calls itself; Ray's begin with `ray::`. Empty when it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def role(process: psutil.Process) -> str:
    """What a process of Ray's does: replica, ingress or other."""
    what = name(process)
    return "replica" if "ServeReplica" in what else "ingress" if "ProxyActor" in what or "haproxy" in what.lower() else "other"


@dataclass
class Tally:
    """What came of calls."""

    phase: list[str]  # what goes on now
    answered: int = 0
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # by phase and reason

    def __str__(self) -> str:
        """In words."""
        lost = "; ".join(f"{count} {text}" for text, count in self.lost.most_common()) or "0"
        return f"{self.answered} answered, {self.wrong} wrong, lost: {lost}"


class Cluster:
    """Nodes of Ray, each a `ray start --block` with all that it starts."""

    def __init__(self, ingress: str, folder: Path) -> None:
        """Start the head. Raises RuntimeError when a node does not start."""
        self._folder, self.nodes = folder, list[psutil.Process]()
        self._environment = {**os.environ, **INGRESS[ingress], "PYTHONPATH": str(ROOT), "RAY_raylet_start_wait_time_s": "120"}
        self._environment["PATH"] = f"{BIN}:{os.environ['PATH']}"
        self.address = f"127.0.0.1:{free_port()}"
        self.ports = [(free_port(), free_port()) for _ in range(NODES)]  # of each node's ingress: gRPC, HTTP
        self.add("--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false", f"--temp-dir={folder}/ray")
        self._environment["RAY_ADDRESS"] = self.address

    def add(self, *flags: str) -> None:
        """Start a node, and wait until it is there."""
        flags = flags or (f"--address={self.address}",)
        command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
        grpc_port, http_port = self.ports[len(self.nodes)]
        environment = {
            **self._environment,
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_WORKER_PROXY_GRPC_PORT": str(grpc_port),
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(http_port),
        }
        with (self._folder / f"node{len(self.nodes)}").open("w+") as log:
            process = subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=environment, cwd=ROOT)  # noqa: S603
            self.nodes.append(psutil.Process(process.pid))
            for _ in range(900):  # a busy machine takes minutes
                time.sleep(0.2)
                if "This command will now block" in (text := Path(log.name).read_text()):
                    return
                if process.poll() is not None:
                    break
            raise RuntimeError(f"a node did not start: {text}")

    def call(self, *command: str) -> str:
        """Run `serve`."""
        done = subprocess.run(  # noqa: S603
            [str(BIN / "serve"), *command], env=self._environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"serve {' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self) -> None:
        """Start Ray Serve."""
        functions = ["--grpc-disable-reflection", "--grpc-servicer-functions", "deploy.ray_app.add_faces"]
        ports = [f"--grpc-port={self.ports[0][0]}", f"--http-port={self.ports[0][1]}"]
        self.call("start", "--proxy-location=EveryNode", *ports, *functions)

    def deploy(self, **autoscaling: float) -> None:
        """Deploy the application, or change how it scales."""
        deployment = {
            "name": "tercet",
            "autoscaling_config": {**REPLICAS, "max_replicas": NODES, **autoscaling},
        }
        told = {"import_path": "deploy.ray_app:app", "args": {"models": str(ROOT / "models")}, "deployments": [deployment]}
        file = self._folder / "app.yaml"  # JSON is YAML
        file.write_text(json.dumps({"applications": [{"name": "default", "route_prefix": "/", **told}]}))
        self.call("run", "--non-blocking", str(file))

    def processes(self, nodes: Sequence[psutil.Process] | None = None) -> list[psutil.Process]:
        """All processes of all nodes, or of some."""
        return [process for node in nodes or self.nodes for process in (node, *node.children(recursive=True))]

    def replicas(self) -> int:
        """How many replicas run, by Ray's own account; -1 while some start or stop."""
        command = [sys.executable, "-c", STATES]
        told = subprocess.run(command, env=self._environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S603
        states = {state: count for state, count in json.loads(told.splitlines()[-1]).items() if count}
        return int(states["RUNNING"]) if set(states) == {"RUNNING"} else -1

    def kill(self) -> Counter[str]:
        """Kill the last node: every process that it started, by its id. What they were; returns when they are gone."""
        node = self.nodes.pop()
        processes = [node, *node.children(recursive=True)]
        found = Counter(role(process) for process in processes)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        return found

    def stop(self) -> None:
        """Kill all nodes."""
        while self.nodes:
            self.kill()

    @contextlib.contextmanager
    def balancer(self) -> Iterator[str]:
        """The address of an HAProxy with deploy/haproxy.cfg, before every node's ingress. Raises RuntimeError without haproxy."""
        address, servers = f"127.0.0.1:{free_port()}", [f"127.0.0.1:{port}" for port, _ in self.ports]
        told = (ROOT / "deploy/haproxy.cfg").read_text().partition("    server a")[0]
        told = told.replace("127.0.0.1:8080", address).replace("/run/", f"{self._folder}/")
        file = self._folder / "haproxy.cfg"
        file.write_text(told + "".join(f"    server {server} {server}\n" for server in servers))
        program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
        if not program:
            raise RuntimeError("there is no haproxy on the PATH")
        with subprocess.Popen([program, "-q", "-db", "-f", str(file)], stderr=subprocess.DEVNULL) as process:  # noqa: S603
            try:
                yield address
            finally:
                process.terminate()


def until_ready(client: triton.InferenceServerClient, most: float = 120) -> None:
    """Wait until the application answers. Raises TimeoutError after `most` seconds."""
    begun = time.monotonic()
    while time.monotonic() - begun < most:
        with contextlib.suppress(triton.InferenceServerException):  # there is no application yet
            if client.is_server_ready():
                return
        time.sleep(0.2)
    raise TimeoutError(f"not ready after {most:g} s")


def ask_as_triton_does(address: str) -> str:
    """Ask for everything that the official client knows, over unary calls and a stream. Raises what it raises, and ValueError."""
    client, streamed = triton.InferenceServerClient(address), list[Any]()
    until_ready(client)
    for folder in sorted((ROOT / "models").glob("*/card.json")):
        card = read_card(folder.parent)
        rows = triton.InferInput(card.input.name, card.example_rows().shape, card.input.datatype)
        rows.set_data_from_numpy(card.example_rows())
        expected = np.array([example.output for example in card.examples])
        client.start_stream(lambda result, error: streamed.append(result or error))
        client.async_stream_infer(card.name, [rows])
        client.stop_stream()  # when all has been answered
        for result in (client.infer(card.name, [rows]), streamed.pop()):
            if np.abs(result.as_numpy(card.output.name) - expected).max() > TOLERANCE:
                raise ValueError(f"{card.name}: a wrong answer")
    try:
        client.infer("nope", [rows])
    except triton.InferenceServerException as error:
        return f"every card's answers, unary and streamed; {error.status()}: {error.message()}"
    raise ValueError("an unknown model was answered")


def used(cluster: Cluster, nodes: Sequence[psutil.Process] | None = None) -> defaultdict[str, float]:
    """CPU seconds of the processes of all nodes, or of some, by what they do."""
    found = defaultdict[str, float](float)
    for process in cluster.processes(nodes):
        try:
            found[role(process)] += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return found


def cost(cluster: Cluster, address: str, model: str, rows: int, rounds: int) -> str:
    """A line of the table: CPU microseconds a request of the plain service, and of Ray's processes, by what they do."""
    load = Load(request=build_request(read_card(ROOT / "models" / model), rows), requests=2000)
    plain, ours = list[float](), list[dict[str, float]]()
    rates = list[tuple[float, float]]()
    with started(str(BIN / "tercet"), "serve", "--port=0", "--device=cpu", f"--models={ROOT / 'models'}") as (other, pid):
        for _ in range(rounds + 1):
            found = drive(other, pid, load)
            check(address, load)
            before, begun = used(cluster), time.perf_counter()
            (with_h2load if shutil.which("h2load") else with_asyncio)(address, load)
            rates.append((found.requests_per_second, load.requests / (time.perf_counter() - begun)))
            plain.append(found.cpu_us)
            ours.append({key: (value - before[key]) / load.requests * 1e6 for key, value in used(cluster).items()})
    parts = {key: statistics.median(each[key] for each in ours[1:]) for key in ("ingress", "replica", "other")}
    figures = " ".join(f"{value:9.0f}" for value in (statistics.median(plain[1:]), sum(parts.values()), *parts.values()))
    rate = " ".join(f"{statistics.median(each):9.0f}" for each in zip(*rates[1:], strict=True))
    return f"{model:10} {rows:4} {figures} {rate}"


async def caller(stub: Any, request: ModelInferRequest, card: Card, tally: Tally, ended: asyncio.Event) -> None:
    """One call after the other, until the one in flight when it is told to end; that one counts too."""
    rows = request.inputs[0].shape[0]
    expected = np.resize(np.array([example.output for example in card.examples]), (rows, *card.output.shape)).ravel()
    while not ended.is_set():
        try:
            response = await stub.ModelInfer(request, timeout=60)
        except grpc.aio.AioRpcError as error:
            tally.lost[f"{tally.phase[0]}: {error.code().name} ({(error.details() or '').splitlines()[0][:60]})"] += 1
            continue
        found = np.frombuffer(response.raw_output_contents[0], card.output.dtype)
        tally.answered += 1
        tally.wrong += int(found.size != expected.size or np.abs(found - expected).max() > TOLERANCE)


class Callers:
    """A load: half of the callers with the retry policy of our client, half with none; 4 callers a connection."""

    def __init__(self, address: str) -> None:
        self._address, self._tasks = address, list[tuple[asyncio.Task[None], asyncio.Event]]()
        self.phase = ["steady"]
        self.plain, self.again = Tally(self.phase), Tally(self.phase)

    async def become(self, count: int) -> None:
        """Have so many callers; those that are too many finish their calls, however long that takes."""
        leaving = [self._tasks.pop() for _ in range(len(self._tasks) - count)]
        for _, ended in leaving:
            ended.set()
        await asyncio.gather(*(task for task, _ in leaving))
        while len(self._tasks) < count:
            again = len(self._tasks) % 8 < 4  # noqa: PLR2004
            if len(self._tasks) % 4 == 0:
                options = {**(OPTIONS if again else {"grpc.enable_retries": 0}), "grpc.use_local_subchannel_pool": 1}
                channel = grpc.aio.insecure_channel(self._address, list(options.items()))
                self._stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            model, rows = CALLS[len(self._tasks) % len(CALLS)]
            card = read_card(ROOT / "models" / model)
            tally, ended = self.again if again else self.plain, asyncio.Event()
            work = caller(self._stub, build_request(card, rows), card, tally, ended)
            self._tasks.append((asyncio.create_task(work), ended))

    def __str__(self) -> str:
        """What came of it."""
        return f"  with the retry policy: {self.again}\n  without:               {self.plain}"


async def until(cluster: Cluster, count: int, most: float) -> float:
    """Seconds until so many replicas run. Raises TimeoutError after `most`."""
    begun = time.monotonic()
    while await asyncio.to_thread(cluster.replicas) != count:
        if time.monotonic() - begun > most:
            raise TimeoutError(f"{cluster.replicas()} replicas after {most:g} s, not {count}")
        await asyncio.sleep(0.2)
    return time.monotonic() - begun


async def scale(cluster: Cluster, address: str) -> str:
    """From 1 replica to 3 and back, under a load that grows and shrinks."""
    callers = Callers(address)
    await callers.become(2)
    await asyncio.sleep(5)
    await callers.become(128)
    up = await until(cluster, NODES, 300)
    await asyncio.sleep(10)
    await callers.become(2)
    down = await until(cluster, 1, 300)
    await asyncio.sleep(5)
    await callers.become(0)
    return f"1 -> {NODES} replicas after {up:.0f} s, -> 1 after {down:.0f} s\n{callers}"


async def kill(cluster: Cluster, address: str, kills: int) -> str:
    """Kill a node with a replica under load, and add another one; so many times."""
    callers, busy, killed = Callers(address), list[float](), Counter[str]()
    await until(cluster, NODES, 300)
    await callers.become(16)
    for _ in range(kills):
        before = used(cluster, cluster.nodes[-1:])["replica"]
        await asyncio.sleep(5)
        busy.append((used(cluster, cluster.nodes[-1:])["replica"] - before) / 5)
        callers.phase[0] = "node killed"
        killed += await asyncio.to_thread(cluster.kill)
        await asyncio.sleep(15)
        callers.phase[0] = "node joins"
        await asyncio.to_thread(cluster.add)
        await until(cluster, NODES, 300)
        await asyncio.sleep(5)
        callers.phase[0] = "steady"
    await callers.become(0)
    cores = ", ".join(f"{share:.0%}" for share in busy)
    return f"{kills} nodes killed, {dict(killed)} processes; their replicas were at {cores} of a core\n{callers}"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--ingress", default="haproxy", type=click.Choice(list(INGRESS)), help="What takes the calls.")
@click.option("--only", type=click.Choice(["cost", "scale", "kill"]), help="One part alone.")
@click.option("--kills", default=3, help="Nodes that are killed, one after the other.")
@click.option("--rounds", default=3, help="Rounds that count; the figures are their medians.")
def main(ingress: str, only: str | None, kills: int, rounds: int) -> None:
    """Start the cluster, and print each figure."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback((cluster := Cluster(ingress, Path(folder))).stop)
        for _ in range(NODES - 1):
            cluster.add()
        cluster.start()
        cluster.deploy(min_replicas=1, upscale_delay_s=2, downscale_delay_s=10)
        address = stack.enter_context(cluster.balancer())
        print(f"{ingress}; tritonclient: {ask_as_triton_does(address)}", flush=True)
        if only in (None, "cost"):
            print("CPU us a request    plain       Ray   ingress   replica     other   plain/s     Ray/s")
            for model, rows in LOADS:
                print(cost(cluster, f"127.0.0.1:{cluster.ports[0][0]}", model, rows, rounds), flush=True)
        if only in (None, "scale"):
            print(asyncio.run(scale(cluster, address)), flush=True)
        if only in (None, "kill"):
            cluster.deploy(min_replicas=NODES)
            print(asyncio.run(kill(cluster, address, kills)), flush=True)


if __name__ == "__main__":
    main()
