"""`tercet bench`, and what the benchmarks share with it: put a load on a server, and check and measure what it answers.

A server is measured against two lower bounds of the same run: `echo`, a bare gRPC server that only parses the request and builds
a response of the same size (this file run as a program), and `session.run`, the engine alone in a loop. On a shared machine, trust
CPU time per request; wall-clock figures of different servers are comparable only within a run, where rounds alternate.
"""

import asyncio
import math
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc
import numpy as np
import psutil
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from tercet.card import Card, Rows, find_models, read_card
from tercet.cli.options import COUNT, CliError, models_option, unknown_model
from tercet.cli.render import grid, to_text
from tercet.client import OPTIONS
from tercet.proto.inference_pb2 import ModelInferRequest, ModelInferResponse
from tercet.proto.inference_pb2_grpc import (
    GRPCInferenceServiceServicer,
    GRPCInferenceServiceStub,
    add_GRPCInferenceServiceServicer_to_server,
)
from tercet.server.config import Config
from tercet.server.engine import TOLERANCE, load_engine

MODELS = Path("models")
ECHO = (sys.executable, "-P", __file__)  # the command that starts the echo server
METHOD = "/inference.GRPCInferenceService/ModelInfer"


def serve(*flags: str, models: Path = MODELS) -> list[str]:
    """Return the command that starts the service on a free port, unless `flags` name one."""
    return [str(Path(sys.executable).with_name("tercet")), "serve", "--port=0", f"--models={models}", *flags]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def started(*command: str) -> Iterator[tuple[str, int]]:
    """Start a server and yield its address, the last word of the first line it prints, and its process id.

    Raises RuntimeError when it does not start.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603
        line = process.stdout.readline().split() if process.stdout else []
        if not line:
            raise RuntimeError(f"{' '.join(command)} did not start")
        try:
            yield line[-1], process.pid
        finally:
            process.terminate()


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process tree."""
    return sum(sum(process.cpu_times()[:2]) for process in process_tree(pid))


def pss_megabytes(pid: int) -> float:
    """Return the proportional set size of a process tree."""
    return sum(process.memory_full_info().pss for process in process_tree(pid)) / 1e6


def build_request(card: Card, rows: int) -> ModelInferRequest:
    """Build a request of `rows` rows: the examples of the card, repeated."""
    array = np.resize(card.example_rows(), (rows, *card.input.shape))
    request = ModelInferRequest(model_name=card.name, raw_input_contents=[array.tobytes()])
    request.inputs.add(name=card.input.name, datatype=card.input.datatype, shape=array.shape)
    return request


def is_correct(response: ModelInferResponse, card: Card, rows: int) -> bool:
    """Compare the response to `build_request(card, rows)` with the example outputs of the card."""
    answers = np.frombuffer(response.raw_output_contents[0], card.output.dtype)
    expected = np.resize([example.output for example in card.examples], (rows, *card.output.shape)).ravel()
    return answers.size == expected.size and bool(np.abs(answers - expected).max() <= TOLERANCE)


def connect(address: str, *, retry: bool = True) -> grpc.aio.Channel:
    """Open a channel with a connection of its own, with or without the retry policy of our client."""
    options = {**(OPTIONS if retry else {"grpc.enable_retries": 0}), "grpc.use_local_subchannel_pool": 1}
    return grpc.aio.insecure_channel(address, list(options.items()))


@dataclass
class Tally:
    """Counts the outcomes of calls."""

    wrong: int = 0
    seconds: list[float] = field(default_factory=list)  # latency of each correct answer
    lost: Counter[str] = field(default_factory=Counter)  # by reason

    def __str__(self) -> str:
        lost = "; ".join(f"{count} {reason}" for reason, count in self.lost.most_common()) or "0"
        return f"{len(self.seconds)} answered, {self.wrong} wrong, lost: {lost}"


@dataclass(frozen=True, kw_only=True)
class Load:
    """A number of equal requests, of which `in_flight` are open at a time, over a number of connections."""

    request: ModelInferRequest
    requests: int
    in_flight: int = 32
    connections: int = 4


class Result(NamedTuple):
    """The figures of one round against one server, or the medians of several rounds."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # of the server's process tree, per request
    latencies_ms: Rows  # (requests,), of all rounds


def drive(address: str, pid: int, load: Load) -> Result:
    """Put a load on a server. Raises grpc.RpcError when it does not answer the request, RuntimeError when it fails later."""
    with grpc.insecure_channel(address) as channel:  # h2load does not read grpc-status
        GRPCInferenceServiceStub(channel).ModelInfer(load.request, timeout=30, wait_for_ready=True)
    before, start = cpu_seconds(pid), time.perf_counter()
    latencies = (drive_with_h2load if shutil.which("h2load") else drive_with_asyncio)(address, load)
    elapsed, used = time.perf_counter() - start, cpu_seconds(pid) - before
    return summarize(latencies, load.requests / elapsed, used / load.requests)


def summarize(latencies: Sequence[float], requests_per_second: float, cpu_seconds_per_request: float) -> Result:
    """Summarize a round; latencies are in seconds."""
    milliseconds = np.array(latencies) * 1e3
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return Result(requests_per_second, p50, p99, cpu_seconds_per_request * 1e6, milliseconds)


def drive_with_h2load(address: str, load: Load, *headers: str) -> Sequence[float]:
    """Put a load on a server with nghttp2's h2load, one thread. Returns latencies in seconds."""
    body = load.request.SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        frame, log = Path(folder, "frame"), Path(folder, "log")
        frame.write_bytes(struct.pack(">BI", 0, len(body)) + body)  # uncompressed, length, message
        streams = max(1, load.in_flight // load.connections)
        command = ["h2load", f"-n{load.requests}", f"-c{load.connections}", f"-m{streams}", f"-d{frame}", f"--log-file={log}"]
        command += [f"-H{header}" for header in ("content-type: application/grpc", "te: trailers", *headers)]
        printed = subprocess.run([*command, f"http://{address}{METHOD}"], check=True, capture_output=True, text=True).stdout  # noqa: S603
        if f"{load.requests} succeeded" not in printed:
            raise RuntimeError(f"h2load: {''.join(re.findall('requests: .*', printed))}")
        return [int(line.split("\t")[2]) / 1e6 for line in log.read_text().splitlines()]


def drive_with_asyncio(address: str, load: Load) -> Sequence[float]:
    """Put a load on a server with grpc.aio from this process. Returns latencies in seconds."""
    latencies: list[float] = []

    async def caller(stub: Any, remaining: Iterator[int]) -> None:
        for _ in remaining:
            start = time.perf_counter()
            await stub.ModelInfer(load.request)
            latencies.append(time.perf_counter() - start)

    async def main() -> None:
        remaining = iter(range(load.requests))
        channels = [connect(address, retry=False) for _ in range(load.connections)]
        stubs = [GRPCInferenceServiceStub(channel) for channel in channels]
        await asyncio.gather(*(caller(stubs[i % len(stubs)], remaining) for i in range(load.in_flight)))
        await asyncio.gather(*(channel.close() for channel in channels))

    asyncio.run(main())
    return latencies


def compare(
    servers: Mapping[str, Sequence[str]], load: Load | Mapping[str, Load], rounds: int, advance: Callable[[], object] = lambda: None
) -> dict[str, Result]:
    """Return the median of each figure over rounds that alternate between servers, each given as the command that starts it.

    `load` is one for all servers, or one per server. A first round warms up and does not count. `advance` is called after each of
    the (1 + rounds) * servers.
    """
    results: dict[str, list[Result]] = {name: [] for name in servers}
    with ExitStack() as stack:
        running = {name: stack.enter_context(started(*command)) for name, command in servers.items()}
        for _ in range(1 + rounds):
            for name, (address, pid) in running.items():
                results[name].append(drive(address, pid, load if isinstance(load, Load) else load[name]))
                advance()
    return {name: median(rounds_of_one[1:]) for name, rounds_of_one in results.items()}


def median(results: Sequence[Result]) -> Result:
    """Return the median of each figure, and the latencies of all rounds."""
    *figures, latencies = zip(*results, strict=True)
    rate, p50, p99, cpu = map(statistics.median, figures)
    return Result(rate, p50, p99, cpu, np.concatenate(latencies))


def session_run(folder: Path, card: Card, rows: int, seconds: float = 1.0) -> Result:
    """Measure the engine alone: one thread that runs one batch of `rows` rows after the other."""
    engine, batch = load_engine(folder, card, Config(device="cpu")), np.resize(card.example_rows(), (rows, *card.input.shape))
    times: list[float] = []
    used, end = time.process_time(), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        engine.run(batch)
        times.append(time.perf_counter() - start)
    return summarize(times, 1 / statistics.median(times), (time.process_time() - used) / len(times))


def quantiles(latencies: Rows) -> str:
    """Format four quantiles of latencies."""
    p50, p90, p99, maximum = np.percentile(latencies, [50, 90, 99, 100])
    return f"p50 {p50:.3g}, p90 {p90:.3g}, p99 {p99:.3g}, max {maximum:.3g}"


def table(results: Mapping[str, Result], rows: int) -> str:
    """Format results, one line per server."""
    lines = [f"{'':12} {'requests/s':>10} {'rows/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'CPU us/request':>15}"]
    for name, (rate, p50, p99, cpu, _) in results.items():
        lines.append(f"{name:12} {rate:10.0f} {rate * rows:10.0f} {p50:8.2f} {p99:8.2f} {cpu:15.0f}")
    return "\n".join(lines)


def histogram(values: Rows) -> str:
    """A bar for the number of values, (n,), in each step of 1, 2, 5, 10, 20 and so on."""
    values = np.maximum(values, 1e-3)
    powers = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
    counts, edges = np.histogram(values, [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)])
    first, *_, last = np.flatnonzero(counts).repeat(2)
    steps = range(first, last + 1)
    bars = [(f"{edges[i]:8g} to {edges[i + 1]:g}", Bar(counts.max(), 0, counts[i], width=40), str(counts[i])) for i in steps]
    return to_text(grid(bars, gap=1), width=80)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", default="fizzbuzz")
@click.option("--rows", type=COUNT, default=1, show_default=True, help="Rows per request.")
@click.option("--in-flight", type=COUNT, default=32, show_default=True, help="Concurrent requests, over up to 4 connections.")
@click.option("--requests", type=COUNT, default=6000, show_default=True, help="Requests per round.")
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Measured rounds; the table has their medians.")
@models_option
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Worker processes of the service.")
def bench(model: str, rows: int, in_flight: int, requests: int, rounds: int, folder: Path, workers: int) -> None:
    """Benchmark the service against baselines.

    The baselines are an empty gRPC server and the inference engine alone. Prints a table and histograms of latency.

    \b
    Examples:
      tercet bench
      tercet bench fizzbuzz --rows 64
      tercet bench mnist --in-flight 1
    """  # noqa: D301
    if model not in (names := find_models(folder)):
        raise unknown_model(model, names)
    card = read_card(folder / model)
    load = Load(request=build_request(card, rows), requests=requests, in_flight=in_flight, connections=min(4, in_flight))
    servers = {"tercet": serve(f"--workers={workers}", models=folder), "echo": ECHO}
    try:
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(model, total=(1 + rounds) * len(servers))
            results = compare(servers, load, rounds, lambda: progress.advance(task))
    except (RuntimeError, grpc.RpcError) as error:
        raise CliError(error.details() or "" if isinstance(error, grpc.Call) else str(error)) from None
    results["session.run"] = session_run(folder / model, card, rows)
    click.echo(table(results, rows))
    for name, result in results.items():
        click.echo(f"\n{name}, ms: {quantiles(result.latencies_ms)}\n{histogram(result.latencies_ms)}")


class EchoServicer(GRPCInferenceServiceServicer):
    """The lower bound of a gRPC server in Python: parse the request, build the response, nothing in between."""

    async def ModelInfer(self, request: ModelInferRequest, _context: Any) -> ModelInferResponse:
        """Answer with four probabilities per row."""
        rows = request.inputs[0].shape[0]
        response = ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        response.raw_output_contents.append(bytes(16 * rows) if request.raw_input_contents[0] else b"")
        response.outputs.add(name="probabilities", datatype="FP32", shape=[rows, 4])
        return response


async def echo() -> None:
    """Run the echo server on a free port until the process is terminated."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    add_GRPCInferenceServiceServicer_to_server(EchoServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo at 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(echo())
