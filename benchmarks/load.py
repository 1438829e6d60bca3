"""Measure a service: requests, rows, latency, and CPU time of the whole process tree, beside two floors of the same run.

The floors: `echo`, a plain grpc.aio server that only parses the request and builds a response of the same size
(`python -m benchmarks.load`), and `session.run`, the engine alone in a loop. CPU time per request is the figure to trust on a
shared machine; the wall-clock figures of different servers are comparable within a run, where rounds alternate.
"""

import asyncio
import re
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import psutil
from tercet.card import Card, Rows
from tercet.proto import inference_pb2_grpc
from tercet.proto.inference_pb2 import ModelInferRequest, ModelInferResponse
from tercet.server.config import Config
from tercet.server.engine import load_engine

METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server is asked: so many requests of so many rows, so many in flight, over so many connections."""

    request: ModelInferRequest
    requests: int
    in_flight: int = 32
    connections: int = 4


class Result(NamedTuple):
    """One round against one server, or the median of several."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # of the server's process tree, a request
    latencies_ms: Rows  # (requests,), of all rounds


def build_request(card: Card, rows: int) -> ModelInferRequest:
    """A request of `rows` rows, the examples of the card repeated."""
    array = np.resize(card.example_rows(), (rows, *card.input.shape))
    request = ModelInferRequest(model_name=card.name, raw_input_contents=[array.tobytes()])
    request.inputs.add(name=card.input.name, datatype=card.input.datatype, shape=array.shape)
    return request


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all below it, in seconds."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in tree)


def drive(address: str, pid: int, load: Load) -> Result:
    """Put a load on a server. Raises RuntimeError when a request fails."""
    check(address, load)
    run = with_h2load if shutil.which("h2load") else with_asyncio
    before, begun = cpu_seconds(pid), time.perf_counter()
    latencies = np.array(run(address, load)) * 1e3
    elapsed, used = time.perf_counter() - begun, cpu_seconds(pid) - before
    p50, p99 = np.percentile(latencies, [50, 99])
    return Result(load.requests / elapsed, p50, p99, used / load.requests * 1e6, latencies)


def check(address: str, load: Load) -> None:
    """Make sure that the server answers the request; h2load does not read grpc-status. Raises grpc.RpcError."""
    with grpc.insecure_channel(address) as channel:
        inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(load.request, timeout=30, wait_for_ready=True)


def with_h2load(address: str, load: Load) -> Sequence[float]:
    """Drive with nghttp2's h2load, one thread; latencies in seconds."""
    body = load.request.SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        frame, log = Path(folder, "frame"), Path(folder, "log")
        frame.write_bytes(struct.pack(">BI", 0, len(body)) + body)  # not compressed, length, message
        counts = ["-n", str(load.requests), "-c", str(load.connections), "-m", str(max(1, load.in_flight // load.connections))]
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        command = ["h2load", *counts, "-d", str(frame), f"--log-file={log}", *headers, f"http://{address}{METHOD}"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
        if f"{load.requests} succeeded" not in printed:
            raise RuntimeError(f"h2load: {re.search('requests: .*', printed)}")
        return [int(line.split("\t")[2]) / 1e6 for line in log.read_text().splitlines()]


def with_asyncio(address: str, load: Load) -> Sequence[float]:
    """Drive with grpc.aio from this process; latencies in seconds."""
    latencies: list[float] = []

    async def caller(stub: Any, remaining: Iterator[int]) -> None:
        for _ in remaining:
            begun = time.perf_counter()
            await stub.ModelInfer(load.request)
            latencies.append(time.perf_counter() - begun)

    async def main() -> None:
        remaining = iter(range(load.requests))
        channels = [
            grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(load.connections)
        ]
        stubs = [inference_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
        await asyncio.gather(*(caller(stubs[i % len(stubs)], remaining) for i in range(load.in_flight)))
        await asyncio.gather(*(channel.close() for channel in channels))

    asyncio.run(main())
    return latencies


@contextmanager
def started(*command: str) -> Iterator[tuple[str, int]]:
    """A server as a process: its address, the last word of the first line that it prints, and its process id."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603
        line = process.stdout.readline().split() if process.stdout else []
        if not line:
            raise RuntimeError(f"{' '.join(command)} did not start")
        try:
            yield line[-1], process.pid
        finally:
            process.terminate()


def compare(
    servers: Mapping[str, Sequence[str]], load: Load, rounds: int, advance: Callable[[], object] = lambda: None
) -> dict[str, Result]:
    """The median of each figure over rounds that alternate between servers, each given as the command that starts it.

    The first round warms up and does not count. `advance` is called after each of the (1 + rounds) * servers.
    """
    results: dict[str, list[Result]] = {name: [] for name in servers}
    with ExitStack() as stack:
        running = {name: stack.enter_context(started(*command)) for name, command in servers.items()}
        for _ in range(1 + rounds):
            for name, (address, pid) in running.items():
                results[name].append(drive(address, pid, load))
                advance()
    return {name: median(found[1:]) for name, found in results.items()}


def median(results: Sequence[Result]) -> Result:
    """The median of each figure, and all latencies."""
    *figures, latencies = zip(*results, strict=True)
    rate, p50, p99, cpu = map(statistics.median, figures)
    return Result(rate, p50, p99, cpu, np.concatenate(latencies))


def quantiles(latencies: Rows) -> str:
    """Latencies in four figures."""
    p50, p90, p99, most = np.percentile(latencies, [50, 90, 99, 100])
    return f"p50 {p50:.3g}, p90 {p90:.3g}, p99 {p99:.3g}, max {most:.3g}"


def session_run(folder: Path, card: Card, rows: int, seconds: float = 1.0) -> Result:
    """The engine alone: one thread, one batch of `rows` rows after the other."""
    engine, batch = load_engine(folder, card, Config(device="cpu")), np.resize(card.example_rows(), (rows, *card.input.shape))
    times: list[float] = []
    used, end = time.process_time(), time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        engine.run(batch)
        times.append(time.perf_counter() - begun)
    used = time.process_time() - used
    latencies = np.array(times) * 1e3
    p50, p99 = np.percentile(latencies, [50, 99])
    return Result(1e3 / p50, p50, p99, used / len(times) * 1e6, latencies)


def table(results: Mapping[str, Result], rows: int) -> str:
    """Results as text, a line a server."""
    lines = [f"{'':12} {'requests/s':>10} {'rows/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'CPU us/request':>15}"]
    for name, found in results.items():
        rate = found.requests_per_second
        lines.append(f"{name:12} {rate:10.0f} {rate * rows:10.0f} {found.p50_ms:8.2f} {found.p99_ms:8.2f} {found.cpu_us:15.0f}")
    return "\n".join(lines)


class Echo(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The floor of a Python gRPC server: parse, build, nothing between."""

    async def ModelInfer(self, request: ModelInferRequest, _context: Any) -> ModelInferResponse:  # noqa: N802
        """Four probabilities a row."""
        rows = request.inputs[0].shape[0]
        response = ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        response.raw_output_contents.append(bytes(16 * rows) if request.raw_input_contents[0] else b"")
        response.outputs.add(name="probabilities", datatype="FP32", shape=[rows, 4])
        return response


async def echo() -> None:
    """Serve the floor on a free port until the process is ended."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo at 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(echo())
