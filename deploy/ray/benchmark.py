"""The service on Ray Serve, on a cluster of three nodes on this machine, with trained models.

    python -m deploy.ray.benchmark --ingress haproxy

It starts the nodes with `ray start`, each with ports of its own, deploys as README.md in this folder says, and puts HAProxy with
deploy/haproxy.cfg in front, which checks the health of each node. It prints whether tritonclient gets correct answers; CPU time per
request of Ray and of the plain service; the outcome of a load while replicas go from 1 to 3 and back; and that of a load while
nodes are killed. Half of the callers have our client's retry policy. README.md has the measured results.
"""

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import psutil
import tritonclient.grpc as triton
from tercet.card import Card, read_card
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server.engine import TOLERANCE

from benchmarks.load import Load, Tally, build_request, connect, drive, free_port, is_correct, process_tree, serve, started
from deploy.ray.app import REPLICAS

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
BIN = Path(sys.executable).parent
NODES = 3
LOADS = (("fizzbuzz", 1), ("fizzbuzz", 64), ("mnist", 1))
CALLS = (("fizzbuzz", 1), ("mnist", 8))  # of the callers; 8 pictures are 6 KB
INGRESS: dict[str, dict[str, str]] = {  # environment variables of the nodes
    "proxy": {},  # the default: a Python proxy on each node
    "fast proxy": {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    },
    "haproxy": {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # a replica that dies with a request: try another
    },
}
STATES = """
import json, ray
from ray import serve
ray.init(log_to_driver=False, logging_level="ERROR")
print(json.dumps(serve.status().applications["default"].deployments["tercet"].replica_states))
"""


def role(process: psutil.Process) -> str:
    """Return what a process of Ray does: replica, ingress or other."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:  # it is gone
        return "other"
    return (
        "replica"
        if "ServeReplica" in command
        else "ingress"
        if "ProxyActor" in command or "haproxy" in command.lower()
        else "other"
    )


class Cluster:
    """Nodes of Ray, each a `ray start --block` with all its child processes."""

    def __init__(self, ingress: str, folder: Path) -> None:
        """Start the head node. Raises RuntimeError when it does not start."""
        self._folder, self.nodes = folder, list[psutil.Process]()
        self._environment = {**os.environ, **INGRESS[ingress], "PYTHONPATH": str(ROOT), "RAY_raylet_start_wait_time_s": "120"}
        self._environment["PATH"] = f"{BIN}:{os.environ['PATH']}"
        self.address = f"127.0.0.1:{free_port()}"
        self.ports = [(free_port(), free_port()) for _ in range(NODES)]  # gRPC and HTTP of each node's ingress
        self.add("--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false", f"--temp-dir={folder}/ray")
        self._environment["RAY_ADDRESS"] = self.address

    def add(self, *flags: str) -> None:
        """Start a node and wait until it runs. Raises RuntimeError when it does not start."""
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
            for _ in range(900):  # minutes, for a busy machine
                time.sleep(0.2)
                if "This command will now block" in (text := Path(log.name).read_text()):
                    return
                if process.poll() is not None:
                    break
            raise RuntimeError(f"a node did not start: {text}")

    def run(self, *command: str) -> str:
        """Run a program of Ray's environment and return its output. Raises RuntimeError."""
        done = subprocess.run(command, env=self._environment, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start_serve(self) -> None:
        """Start Ray Serve."""
        functions = ["--grpc-disable-reflection", "--grpc-servicer-functions", "deploy.ray.app.add_servicers"]
        ports = [f"--grpc-port={self.ports[0][0]}", f"--http-port={self.ports[0][1]}"]
        self.run(str(BIN / "serve"), "start", "--proxy-location=EveryNode", *ports, *functions)

    def deploy(self, **autoscaling: float) -> None:
        """Deploy the application, or change how it scales."""
        target = {"target_ongoing_requests": REPLICAS["autoscaling_config"]["target_ongoing_requests"], "max_replicas": NODES}
        deployment = {"name": "tercet", "autoscaling_config": {**target, **autoscaling}}
        application = {"import_path": "deploy.ray.app:app", "args": {"models": str(MODELS)}, "deployments": [deployment]}
        file = self._folder / "app.yaml"  # JSON is YAML
        file.write_text(json.dumps({"applications": [{"name": "default", "route_prefix": "/", **application}]}))
        self.run(str(BIN / "serve"), "run", "--non-blocking", str(file))

    def cpu_seconds(self, nodes: Sequence[psutil.Process] | None = None) -> defaultdict[str, float]:
        """Return the CPU seconds of the processes of all nodes, or of some, by role."""
        seconds = defaultdict[str, float](float)
        for node in nodes or self.nodes:
            for process in process_tree(node.pid):
                with contextlib.suppress(psutil.Error):
                    seconds[role(process)] += sum(process.cpu_times()[:2])
        return seconds

    def replicas(self) -> int:
        """Return how many replicas run, according to Ray; -1 while some start or stop."""
        output = self.run(sys.executable, "-c", STATES)
        states = {state: count for state, count in json.loads(output.splitlines()[-1]).items() if count}
        return int(states["RUNNING"]) if set(states) == {"RUNNING"} else -1

    def kill(self) -> Counter[str]:
        """Kill the last node, that is, all its processes, and wait until they are gone. Returns their roles."""
        processes = process_tree(self.nodes.pop().pid)
        roles = Counter(role(process) for process in processes)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        return roles

    def stop(self) -> None:
        """Kill all nodes."""
        while self.nodes:
            self.kill()

    @contextlib.contextmanager
    def balancer(self) -> Iterator[str]:
        """Run HAProxy with deploy/haproxy.cfg in front of all nodes; yield its address. Raises RuntimeError without haproxy."""
        address, servers = f"127.0.0.1:{free_port()}", [f"127.0.0.1:{port}" for port, _ in self.ports]
        text = (ROOT / "deploy/haproxy.cfg").read_text().partition("    server a")[0]
        text = text.replace("127.0.0.1:8080", address).replace("/run/", f"{self._folder}/")
        file = self._folder / "haproxy.cfg"
        file.write_text(text + "".join(f"    server {server} {server}\n" for server in servers))
        program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
        if not program:
            raise RuntimeError("haproxy is not on the PATH")
        with subprocess.Popen([program, "-q", "-db", "-f", str(file)], stderr=subprocess.DEVNULL) as process:  # noqa: S603
            try:
                yield address
            finally:
                process.terminate()


def check_with_tritonclient(address: str) -> str:
    """Ask for the answers of every card, unary and streamed. Raises what tritonclient raises, TimeoutError and ValueError."""
    client, streamed, end = triton.InferenceServerClient(address), list[Any](), time.monotonic() + 120
    ready = False
    while not ready:
        with contextlib.suppress(triton.InferenceServerException):  # the application is not there yet
            ready = client.is_server_ready()
        if time.monotonic() > end:
            raise TimeoutError("not ready after 120 s")
        time.sleep(0.2)
    for path in sorted(MODELS.glob("*/card.json")):
        card = read_card(path.parent)
        rows = triton.InferInput(card.input.name, card.example_rows().shape, card.input.datatype)
        rows.set_data_from_numpy(card.example_rows())
        expected = np.array([example.output for example in card.examples])
        client.start_stream(lambda result, error: streamed.append(result or error))
        client.async_stream_infer(card.name, [rows])
        client.stop_stream()  # returns when all has been answered
        for result in (client.infer(card.name, [rows]), streamed.pop()):
            if np.abs(result.as_numpy(card.output.name) - expected).max() > TOLERANCE:
                raise ValueError(f"{card.name}: a wrong answer")
    try:
        client.infer("nope", [rows])
    except triton.InferenceServerException as error:
        return f"every card's answers, unary and streamed; {error.status()}: {error.message()}"
    raise ValueError("an unknown model was answered")


def cost(cluster: Cluster, address: str, model: str, rows: int, rounds: int) -> str:
    """Return a line of the table: CPU microseconds per request of the plain service and of Ray's processes, by role."""
    load = Load(request=build_request(read_card(MODELS / model), rows), requests=2000)
    plain, ours, rates = list[float](), list[dict[str, float]](), list[tuple[float, float]]()
    with started(*serve("--device=cpu", models=MODELS)) as (plain_address, pid):
        for _ in range(rounds + 1):
            result = drive(plain_address, pid, load)
            before = cluster.cpu_seconds()
            rates.append((result.requests_per_second, drive(address, os.getpid(), load).requests_per_second))
            plain.append(result.cpu_us)
            ours.append({key: (value - before[key]) / load.requests * 1e6 for key, value in cluster.cpu_seconds().items()})
    parts = [statistics.median(each[key] for each in ours[1:]) for key in ("ingress", "replica", "other")]
    figures = " ".join(f"{value:9.0f}" for value in (statistics.median(plain[1:]), sum(parts), *parts))
    rate = " ".join(f"{statistics.median(each):9.0f}" for each in zip(*rates[1:], strict=True))
    return f"{model:10} {rows:4} {figures} {rate}"


class Callers:
    """A load: half of the callers with the retry policy of our client, half without; 4 callers per connection."""

    def __init__(self, address: str) -> None:
        self._address, self._tasks = address, list[tuple[asyncio.Task[None], asyncio.Event]]()
        self.phase = "steady"  # what happens now
        self.plain, self.retrying = Tally(), Tally()

    async def _call(self, stub: Any, request: ModelInferRequest, card: Card, tally: Tally, ended: asyncio.Event) -> None:
        """Send one call after the other until `ended` is set; a call in flight then counts too."""
        while not ended.is_set():
            start = time.perf_counter()
            try:
                response = await stub.ModelInfer(request, timeout=60)
            except grpc.aio.AioRpcError as error:
                tally.lost[f"{self.phase}: {error.code().name} ({(error.details() or '').splitlines()[0][:60]})"] += 1
                continue
            tally.seconds.append(time.perf_counter() - start)
            tally.wrong += not is_correct(response, card, request.inputs[0].shape[0])

    async def set_count(self, count: int) -> None:
        """Change the number of callers; those that leave finish their calls, however long that takes."""
        leaving = [self._tasks.pop() for _ in range(len(self._tasks) - count)]
        for _, ended in leaving:
            ended.set()
        await asyncio.gather(*(task for task, _ in leaving))
        while len(self._tasks) < count:
            retry = len(self._tasks) % 8 < 4  # noqa: PLR2004
            if len(self._tasks) % 4 == 0:
                self._stub = GRPCInferenceServiceStub(connect(self._address, retry=retry))
            model, rows = CALLS[len(self._tasks) % len(CALLS)]
            card, ended = read_card(MODELS / model), asyncio.Event()
            work = self._call(self._stub, build_request(card, rows), card, self.retrying if retry else self.plain, ended)
            self._tasks.append((asyncio.create_task(work), ended))

    def __str__(self) -> str:
        return f"  with the retry policy: {self.retrying}\n  without:               {self.plain}"


async def until_replicas(cluster: Cluster, count: int) -> float:
    """Return the seconds until `count` replicas run. Raises TimeoutError after 300 s."""
    start = time.monotonic()
    while await asyncio.to_thread(cluster.replicas) != count:
        if time.monotonic() - start > 300:  # noqa: PLR2004
            raise TimeoutError(f"{cluster.replicas()} replicas after 300 s, expected {count}")
        await asyncio.sleep(0.2)
    return time.monotonic() - start


async def scale(cluster: Cluster, address: str) -> str:
    """Scale from 1 replica to 3 and back, under a load that grows and shrinks."""
    callers = Callers(address)
    await callers.set_count(2)
    await asyncio.sleep(5)
    await callers.set_count(128)
    up = await until_replicas(cluster, NODES)
    await asyncio.sleep(10)
    await callers.set_count(2)
    down = await until_replicas(cluster, 1)
    await asyncio.sleep(5)
    await callers.set_count(0)
    return f"1 -> {NODES} replicas after {up:.0f} s, -> 1 after {down:.0f} s\n{callers}"


async def kill(cluster: Cluster, address: str, kills: int) -> str:
    """Kill a node with a replica under load and add another one, several times."""
    callers, busy, killed = Callers(address), list[float](), Counter[str]()
    await until_replicas(cluster, NODES)
    await callers.set_count(16)
    for _ in range(kills):
        before = cluster.cpu_seconds(cluster.nodes[-1:])["replica"]
        await asyncio.sleep(5)
        busy.append((cluster.cpu_seconds(cluster.nodes[-1:])["replica"] - before) / 5)
        callers.phase = "node killed"
        killed += await asyncio.to_thread(cluster.kill)
        await asyncio.sleep(15)
        callers.phase = "node joins"
        await asyncio.to_thread(cluster.add)
        await until_replicas(cluster, NODES)
        await asyncio.sleep(5)
        callers.phase = "steady"
    await callers.set_count(0)
    cores = ", ".join(f"{share:.0%}" for share in busy)
    return f"{kills} nodes killed, {dict(killed)} processes; their replicas were at {cores} of a core\n{callers}"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--ingress", default="haproxy", type=click.Choice(list(INGRESS)), help="What accepts the calls.")
@click.option("--only", type=click.Choice(["cost", "scale", "kill"]), help="Only one part.")
@click.option("--kills", default=3, help="Nodes that are killed, one after the other.")
@click.option("--rounds", default=3, help="Rounds that count; the figures are their medians.")
def main(ingress: str, only: str | None, kills: int, rounds: int) -> None:
    """Start the cluster and print each figure."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback((cluster := Cluster(ingress, Path(folder))).stop)
        for _ in range(NODES - 1):
            cluster.add()
        cluster.start_serve()
        cluster.deploy(min_replicas=1, upscale_delay_s=2, downscale_delay_s=10)
        address = stack.enter_context(cluster.balancer())
        print(f"{ingress}; tritonclient: {check_with_tritonclient(address)}", flush=True)
        if only in (None, "cost"):
            print("CPU us/request      plain       Ray   ingress   replica     other   plain/s     Ray/s")
            for model, rows in LOADS:
                print(cost(cluster, f"127.0.0.1:{cluster.ports[0][0]}", model, rows, rounds), flush=True)
        if only in (None, "scale"):
            print(asyncio.run(scale(cluster, address)), flush=True)
        if only in (None, "kill"):
            cluster.deploy(min_replicas=NODES)
            print(asyncio.run(kill(cluster, address, kills)), flush=True)


if __name__ == "__main__":
    main()
