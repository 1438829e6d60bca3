"""How many cores, hosts, bits and what money a rate of requests takes: `python benchmarks/capacity.py`, with trained models.

What one request costs is measured here, a small discrete-event simulation predicts one and two workers from it, and what they do is
printed beside, with the error of the prediction. docs/scale.md has what came out.
"""

import contextlib
import itertools
import math
import random
import resource
import socket
import statistics
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc
import numpy as np
import simpy
from tercet.card import read_card
from tercet.proto import inference_pb2_grpc
from tercet.proto.inference_pb2 import ModelStatisticsRequest

from benchmarks.load import Load, build_request, drive, session_run, started

MODELS = Path("models")
SERVE = [str(Path(sys.executable).with_name("tercet")), "serve", "--port=0", "--device=cpu", f"--models={MODELS}"]
LOADS = (("fizzbuzz", 1), ("fizzbuzz", 64), ("diabetes", 1), ("mnist", 1))
RATES = (10_000, 100_000, 1_000_000)  # requests a second
HOURS = 730  # of a month
WARM = 0.1  # part of the requests that do not count
Events = Generator[Any, Any, None]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """CPU seconds of one request."""

    loop: float  # on a worker's event loop: gRPC, decode, encode
    start: float = 0.0  # of a batch
    row: float = 0.0  # of a row in it
    client: float = 0.0  # of the load generator, which is one thread and takes from the same cores


class Predicted(NamedTuple):
    """What a simulation says; seconds."""

    requests_per_second: float
    p50: float
    p99: float
    mean: float


class Worker:
    """A process of the service: an event loop, a queue, and an engine that takes all that waits."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation, self._waiting = simulation, deque[simpy.Event]()
        self._loop, self._work = simpy.Resource(simulation.env), simpy.Store(simulation.env)
        self.open = 0  # requests that it has
        simulation.env.process(self._engine())

    def answer(self) -> Events:
        """One request: decode, wait for its batch, and for its end."""
        with self._loop.request() as turn:
            yield turn
            yield from self._simulation.work(self._simulation.costs.loop)
        self._waiting.append(done := self._simulation.env.event())
        self._work.put(None)
        yield done

    def _engine(self) -> Events:
        """Run what waits, for ever; a short batch on the event loop, a long one beside it."""
        simulation = self._simulation
        while True:
            yield self._work.get()
            if not self._waiting:  # it went with the batch before
                continue
            if len(self._waiting) * simulation.rows > simulation.inline_rows:
                yield from self._run()
            else:
                with self._loop.request() as turn:  # after the requests that have come: they join the batch
                    yield turn
                    yield from self._run()

    def _run(self) -> Events:
        """One batch."""
        simulation = self._simulation
        most = max(1, simulation.batch_rows // simulation.rows)
        batch = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        yield from simulation.work(simulation.costs.start + simulation.costs.row * simulation.rows * len(batch))
        for done in batch:
            done.succeed()


class Simulation:
    """Requests, a balancer, workers and cores."""

    def __init__(
        self,
        costs: Costs,
        *,
        workers: int = 1,
        cores: int | None = None,
        rows: int = 1,
        inline_rows: int = 1024,
        batch_rows: int = 1024,
        connections: int = 4,
        balance: str = "connection",
        seed: int = 0,
    ) -> None:
        """Everything shares so many `cores`, or has as many as it takes.

        `balance`: connection (each stays with the worker that chance gave it, as SO_REUSEPORT does), round robin or least (a
        request goes to the worker that has the fewest).
        """
        self.costs, self.rows, self.inline_rows, self.batch_rows = costs, rows, inline_rows, batch_rows
        self.env, self._chance = simpy.Environment(), random.Random(seed)  # noqa: S311  no secret
        self._cores = simpy.Resource(self.env, cores) if cores else None
        self._workers = [Worker(self) for _ in range(workers)]
        self._mine = [self._chance.choice(self._workers) for _ in range(connections)]
        self._turns = itertools.cycle(self._workers)
        self._balance, self._client = balance, simpy.Resource(self.env)
        self._sent, self._ended = 0, list[tuple[float, float]]()  # when requests ended, and how long they took

    def work(self, seconds: float) -> Events:
        """Keep a core busy."""
        if self._cores is None:
            yield self.env.timeout(seconds)
            return
        with self._cores.request() as core:
            yield core
            yield self.env.timeout(seconds)

    def closed(self, requests: int, in_flight: int) -> Predicted:
        """So many callers, each with one request in flight."""
        for number in range(in_flight):
            self.env.process(self._caller(number, requests))
        return self._result(requests)

    def open(self, requests: int, rate: float) -> Predicted:
        """Requests that come by chance (Poisson), so many a second."""
        self.env.process(self._arrivals(requests, rate))
        return self._result(requests)

    def _arrivals(self, requests: int, rate: float) -> Events:
        for number in range(requests):
            yield self.env.timeout(self._chance.expovariate(rate))
            self.env.process(self._request(number))

    def _caller(self, number: int, requests: int) -> Events:
        while self._sent < requests:
            self._sent += 1
            if self.costs.client:
                with self._client.request() as turn:
                    yield turn
                    yield from self.work(self.costs.client)
            yield from self._request(number)

    def _request(self, number: int) -> Events:
        """Choose a worker, and let it answer."""
        if self._balance == "least":
            worker = min(self._workers, key=lambda each: each.open)
        elif self._balance == "round robin":
            worker = next(self._turns)
        else:
            worker = self._mine[number % len(self._mine)]
        begun, worker.open = self.env.now, worker.open + 1
        yield from worker.answer()
        worker.open -= 1
        self._ended.append((self.env.now, self.env.now - begun))

    def _result(self, requests: int) -> Predicted:
        """Run to the end; the first requests do not count."""
        while len(self._ended) < requests:
            self.env.step()
        counted = self._ended[int(WARM * requests) :]
        seconds = [taken for _, taken in counted]
        p50, p99 = np.percentile(seconds, [50, 99])
        return Predicted((len(counted) - 1) / (counted[-1][0] - counted[0][0]), float(p50), float(p99), statistics.fmean(seconds))


class Measured(NamedTuple):
    """What a load did to the service."""

    requests_per_second: float
    p50: float  # seconds
    p99: float
    cpu: float  # seconds a request, of the service
    client: float  # seconds a request, of the load generator
    batch: float  # requests


def measure(load: Load, model: str, workers: int, rounds: int) -> Measured:
    """The median of some rounds, after one that warms up."""
    found = list[Measured]()
    with started(*SERVE, f"--workers={workers}") as (address, pid):
        for _ in range(1 + rounds):
            before, batches = spent(), executed(address, model)
            result = drive(address, pid, load)
            ran = executed(address, model) - batches
            client = (spent() - before) / load.requests
            figures = result.p50_ms / 1e3, result.p99_ms / 1e3, result.cpu_us / 1e6
            found.append(Measured(result.requests_per_second, *figures, client, load.requests / max(1, ran)))
    return Measured(*(statistics.median(values) for values in zip(*found[1:], strict=True)))


def spent() -> float:
    """CPU seconds of this process and of those that it started and that have ended, as h2load has."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def executed(address: str, model: str) -> int:
    """Batches that a worker has run; of one of the workers, whichever answers."""
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        return int(stub.ModelStatistics(ModelStatisticsRequest(name=model), timeout=30).model_stats[0].execution_count)


def costs(found: Measured, model: str, rows: int) -> Costs:
    """Split what a request costs into what the engine does, by itself, and the rest."""
    card = read_card(MODELS / model)
    small, large = (session_run(MODELS / model, card, count, 0.5).cpu_us / 1e6 for count in (1, 64))
    row = (large - small) / 63
    start = max(0.0, small - row)
    loop = max(0.0, found.cpu - start / found.batch - row * rows)
    return Costs(loop=loop, start=start, row=row, client=found.client)


@contextlib.contextmanager
def counting(address: str) -> Iterator[tuple[str, list[int]]]:
    """A relay to a service: its address, and a list of the bytes that went either way."""
    host, _, port = address.rpartition(":")
    counts = [0, 0]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pump(source: socket.socket, target: socket.socket, way: int) -> None:
            with contextlib.suppress(OSError):  # either end has gone
                while part := source.recv(2**16):
                    counts[way] += len(part)
                    target.sendall(part)

        def relay() -> None:
            near, _ = server.accept()
            far = socket.create_connection((host, int(port)))
            for way, pair in enumerate(((near, far), (far, near))):
                threading.Thread(target=pump, args=(*pair, way), daemon=True).start()

        threading.Thread(target=relay, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", counts


def wire(load: Load, calls: int = 200) -> tuple[float, float]:
    """Bytes of a request and of its response on a connection, HTTP/2 framing and headers included, TCP and IP not."""
    with started(*SERVE) as (address, _), counting(address) as (relay, counts), grpc.insecure_channel(relay) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(load.request, timeout=30)  # the connection's own, and headers that HPACK knows from then on
        before = list(counts)
        for _ in range(calls):
            stub.ModelInfer(load.request, timeout=30)
        there, back = ((now - then) / calls for now, then in zip(counts, before, strict=True))
    return there, back


def error(predicted: float, measured: float) -> str:
    """How far off a prediction is."""
    return f"{predicted / measured - 1:+5.0%}"


def compare(model: str, rows: int, rounds: int, cores: int) -> tuple[Measured, Costs]:
    """Print, for one and two workers, what was predicted from one worker's costs and what was measured."""
    load = Load(request=build_request(read_card(MODELS / model), rows), requests=4000)
    one = measure(load, model, 1, rounds)
    cost = costs(one, model, rows)
    for workers, found in ((1, one), (2, measure(load, model, 2, rounds))):
        runs = [Simulation(cost, workers=workers, cores=cores, rows=rows, seed=seed).closed(4000, 32) for seed in range(5)]
        said = Predicted(*(statistics.median(values) for values in zip(*runs, strict=True)))
        pairs = [(said.requests_per_second, found.requests_per_second), (said.p50 * 1e3, found.p50 * 1e3)]
        pairs.append((said.p99 * 1e3, found.p99 * 1e3))
        text = "  ".join(f"{a:8.4g} {b:8.4g} {error(a, b)}" for a, b in pairs)
        print(f"{model:12} {rows:4} {workers:7}  {text}", flush=True)
    return one, cost


def needs(rate: float, cpu: float, size: float, *, host_cores: int, utilisation: float, price: float) -> str:
    """What a rate of requests takes: cores, hosts, Gbit/s of the busier direction, money a month."""
    cores = rate * cpu / utilisation
    return f"{math.ceil(cores):7} {math.ceil(cores / host_cores):6} {rate * size * 8 / 1e9:8.2f} {cores * price * HOURS:10.0f}"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rounds", default=3, help="Rounds that count; the figures are their medians.")
@click.option("--cores", default=2, help="Cores that the service and the load generator share here.")
@click.option("--host-cores", default=16, help="Cores of a host to buy.")
@click.option("--utilisation", default=0.6, help="How busy a core may be; the rest is for bursts and for a host that is lost.")
@click.option("--price", default=0.04, help="Of a core for an hour: an assumption, no vendor's.")
def main(rounds: int, cores: int, host_cores: int, utilisation: float, price: float) -> None:
    """Measure, predict, compare, and extrapolate."""
    print("                             requests/s               p50 ms                   p99 ms")
    print(f"{'model':12} rows workers {'said':>9} {'found':>8}       {'said':>9} {'found':>8}       {'said':>9} {'found':>8}")
    found = {(model, rows): compare(model, rows, rounds, cores) for model, rows in LOADS}
    print(f"\n{'model':12} rows   CPU us   loop us  start us  us a row  in bytes  out bytes  10 Gbit/s at  25 Gbit/s at")
    sizes = dict[tuple[str, int], float]()
    for (model, rows), (one, cost) in found.items():
        there, back = wire(Load(request=build_request(read_card(MODELS / model), rows), requests=1))
        sizes[model, rows] = size = max(there, back)
        parts = " ".join(f"{part * 1e6:9.1f}" for part in (one.cpu, cost.loop, cost.start, cost.row))
        print(f"{model:12} {rows:4} {parts} {there:9.0f} {back:10.0f} {10e9 / 8 / size:13,.0f} {25e9 / 8 / size:13,.0f}")
    print(f"\n{'model':12} rows requests/s   cores  hosts   Gbit/s  a month")
    for (model, rows), (one, _) in found.items():
        for rate in RATES:
            told = needs(rate, one.cpu, sizes[model, rows], host_cores=host_cores, utilisation=utilisation, price=price)
            print(f"{model:12} {rows:4} {rate:10,} {told}")


if __name__ == "__main__":
    main()
