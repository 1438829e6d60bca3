"""How the service behaves when things go wrong, measured from outside: `python -m benchmarks.faults`, with trained models.

    python -m benchmarks.faults                       # every row, about an hour
    python -m benchmarks.faults kill --seconds 10     # one row, shorter

Each row starts a service of its own. The load comes from this process, over separate connections, and every answer is checked.
README.md in this folder has the measured results.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tercet.card import read_card
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelInferRequest, ModelStatisticsRequest, RepositoryModelLoadRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.load import MODELS, Load, Tally, build_request, connect, drive_with_h2load, is_correct, process_tree, serve

SERVING = health_pb2.HealthCheckResponse.SERVING
WORKERS = health_pb2.HealthCheckRequest(service="workers")
RATE = 500  # requests per second of a load well below the limit
LARGE = 4096  # rows of a request that keeps mnist busy for a while


@dataclass
class Running:
    """A service: its parent process and its addresses."""

    process: subprocess.Popen[str]
    address: str
    metrics: str

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes that serve."""
        parent = psutil.Process(self.process.pid)
        return [child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE] or [parent]

    def size(self) -> tuple[float, int, int]:
        """Return proportional set size in MB, file descriptors and threads of all processes."""
        tree = process_tree(self.process.pid)
        megabytes = sum(process.memory_full_info().pss for process in tree) / 1e6
        return megabytes, sum(process.num_fds() for process in tree), sum(process.num_threads() for process in tree)


@contextmanager
def running(*flags: str, models: Path = MODELS) -> Iterator[Running]:
    """Run a service with metrics on free ports."""
    command = serve("--metrics-port=0", *flags, models=models)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603
        lines = [process.stdout.readline() if process.stdout else "" for _ in range(2)]
        if " at " not in lines[0]:
            raise click.ClickException(f"{' '.join(command)} did not start")
        try:
            yield Running(process, *(line.rsplit(" at ", 1)[1].strip() for line in lines))
        finally:
            process.terminate()


async def answer_four(stub: Any, tally: Tally) -> None:
    """Ask for the words of four numbers and check them."""
    numbers = [random.randrange(1024) for _ in range(4)]  # noqa: S311  not a secret
    expected = ["fizz" * (n % 3 == 0) + "buzz" * (n % 5 == 0) or str(n) for n in numbers]
    start = time.perf_counter()
    try:
        words = list((await stub.Answer(AnswerRequest(numbers=numbers), timeout=30)).words)
    except grpc.aio.AioRpcError as error:
        tally.lost[error.code().name] += 1
        await asyncio.sleep(0.01)
        return
    if words != expected:
        tally.wrong += 1
    else:
        tally.seconds.append(time.perf_counter() - start)


@asynccontextmanager
async def loaded(
    address: str, tally: Callable[[], Tally], *, callers: int = 32, rate: float = 0, retry: bool = True
) -> AsyncIterator[None]:
    """Run a load over 8 connections: callers without a pause, or `rate` requests per second in all. `tally` says where to count."""
    channels = [connect(address, retry=retry) for _ in range(min(8, callers))]

    async def caller(stub: Any) -> None:
        due = time.perf_counter() + random.random() * callers / (rate or 1)  # noqa: S311  not a secret
        while True:
            if rate:
                await asyncio.sleep(max(0, due - time.perf_counter()))
                due += callers / rate
            await answer_four(stub, tally())

    tasks = [asyncio.create_task(caller(FizzBuzzStub(channels[i % len(channels)]))) for i in range(callers)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in channels))


def print_row(name: str, measured: str, bound: str) -> None:
    print(f"| {name} | {measured} | {bound} |", flush=True)


async def kill(seconds: float, _count: int) -> None:
    """Kill a worker every 2 s."""
    await replace_workers(seconds, signal.SIGKILL, "killed")


async def restart(seconds: float, _count: int) -> None:
    """Terminate a worker every 2 s."""
    await replace_workers(seconds, signal.SIGTERM, "sent SIGTERM")


async def replace_workers(seconds: float, number: signal.Signals, verb: str) -> None:
    tally, replaced = Tally(), []
    with running("--workers", "2") as service:
        async with loaded(service.address, lambda: tally, rate=RATE), connect(service.address) as channel:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                await asyncio.sleep(2)
                oldest = min(service.workers, key=lambda worker: worker.create_time())
                oldest.send_signal(number)
                await asyncio.to_thread(oldest.wait)  # after SIGTERM it drains first
                start = time.monotonic()
                while len(service.workers) < 2 or not await all_workers_serve(channel):  # noqa: PLR2004
                    await asyncio.to_thread(time.sleep, 0.02)
                replaced.append(time.monotonic() - start)
    measured = f"{len(replaced)} times; {tally}; replaced in {statistics.median(replaced):.2f} s, at most {max(replaced):.2f}"
    print_row(f"a worker of two is {verb} every 2 s for {seconds:g} s under {RATE} requests/s", measured, "0 wrong, 0 lost, < 1 s")


async def all_workers_serve(channel: grpc.aio.Channel) -> bool:
    return bool((await health_pb2_grpc.HealthStub(channel).Check(WORKERS, timeout=30)).status == SERVING)


def queued_rows(service: Running, model: str) -> float:
    """Return the number of queued rows from the metrics."""
    with urllib.request.urlopen(service.metrics) as response:  # noqa: S310  our own
        match = re.search(rf'^tercet_queue_rows{{model="{model}"}} (\S+)', response.read().decode(), flags=re.MULTILINE)
    return float(match[1]) if match else 0


async def sigterm(_seconds: float, count: int) -> None:
    """Send SIGTERM with 32 requests in the engine and 100 in the queue, while other callers go on."""
    card = read_card(MODELS / "mnist")
    requests = [build_request(card, rows) for rows in (LARGE, *[64] * 132)]
    accepted, others, codes, health_first = Tally(), Tally(), Counter[int](), 0
    ends, open_calls = list[float](), list[int]()
    while len(open_calls) < count:
        with running() as service:
            async with (
                loaded(service.address, lambda: others, callers=16, retry=False),
                connect(service.address, retry=False) as channel,
            ):
                stub = GRPCInferenceServiceStub(channel)
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                await watch.read()
                calls = [stub.ModelInfer(request) for request in requests]
                while await asyncio.to_thread(queued_rows, service, "mnist") < 132 * 64 and not all(call.done() for call in calls):
                    pass
                still_open = sum(not call.done() for call in calls)
                if still_open < len(
                    calls
                ):  # the large request, which keeps the engine busy, ended before all others came: try again
                    continue
                service.process.send_signal(signal.SIGTERM)
                start, before = time.monotonic(), others.lost.total()
                await watch.read()
                health_first += others.lost.total() == before
                open_calls.append(still_open)
                for call, request in zip(calls, requests, strict=True):
                    try:
                        accepted.wrong += not is_correct(await call, card, request.inputs[0].shape[0])
                        accepted.seconds.append(0)
                    except grpc.aio.AioRpcError as error:
                        accepted.lost[error.code().name] += 1
                codes[await asyncio.to_thread(service.process.wait)] += 1
                ends.append(time.monotonic() - start)
    exits = ", ".join(f"{times} x exit {code}" for code, times in codes.items())
    measured = (
        f"calls sent before: {accepted}; at least {min(open_calls)} were open; health first {health_first} of {count}; {exits}"
    )
    measured += f", after at most {max(ends):.1f} s"
    print_row(f"SIGTERM under load, 32 in flight, 100 queued, {count} times", measured, "0 lost, health first, exit 0 within 30 s")
    print_row("the calls that came after it, without a retry policy", str(others), "UNAVAILABLE only")


async def reload(seconds: float, count: int) -> None:
    """Reload a model under load, in turns with periods without reloads."""
    calm, busy, failed, turns = Tally(), Tally(), 0, 10
    current = [calm]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copytree(MODELS / "fizzbuzz", Path(folder, "fizzbuzz")))
        with running("--watch", "0", models=Path(folder)) as service:
            async with loaded(service.address, lambda: current[0], rate=RATE), connect(service.address) as channel:
                stub = GRPCInferenceServiceStub(channel)
                await asyncio.sleep(2)
                calm.seconds.clear()
                before = service.size()[0]
                for turn in range(2 * turns):
                    current[0] = busy if turn % 2 else calm
                    if not turn % 2:
                        await asyncio.sleep(seconds / turns)
                        continue
                    for _ in range(count // turns):
                        start = time.perf_counter()
                        change_card(model / "card.json")
                        failed += await fails(stub.RepositoryModelLoad(RepositoryModelLoadRequest(model_name="fizzbuzz")))
                        await asyncio.sleep(max(0, seconds / count - time.perf_counter() + start))
                after = service.size()[0]
    (p50, p99), (p50_busy, p99_busy) = (np.percentile(tally.seconds, [50, 99]) * 1e3 for tally in (calm, busy))
    lost = sum(tally.lost.total() + tally.wrong for tally in (calm, busy))
    measured = (
        f"{failed} refused, {lost} of {len(calm.seconds) + len(busy.seconds)} failed; p50/p99 {p50:.1f}/{p99:.1f} ms without, "
    )
    measured += f"{p50_busy:.1f}/{p99_busy:.1f} with ({p99_busy / p99 - 1:+.0%}); {before:.0f} -> {after:.0f} MB"
    print_row(f"{count} reloads under {RATE} requests/s, in turns of {seconds:g} s each way", measured, "0 failed, p99 +10 %")


def change_card(path: Path) -> None:
    """Replace a card by one with another commit."""
    card = json.loads(path.read_text()) | {"git_commit": f"{random.getrandbits(160):040x}"}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(card))
    new.replace(path)


async def fails(call: Awaitable[Any]) -> bool:
    """Return whether a call ends with an error."""
    try:
        await call
    except grpc.aio.AioRpcError:
        return True
    return False


async def overload(seconds: float, _count: int) -> None:
    """Send ten times the load that the service can answer, of requests that are much cheaper to refuse than to run."""
    request = build_request(read_card(MODELS / "fizzbuzz_any"), LARGE)
    answered, refused, sizes = list[float](), list[float](), list[float]()
    lost = Counter[str]()

    async def infer(stub: Any) -> None:
        start = time.perf_counter()
        try:
            await stub.ModelInfer(request, timeout=60)
            answered.append(time.perf_counter() - start)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                refused.append(time.perf_counter() - start)
            else:
                lost[error.code().name] += 1

    with running("--queue-timeout", "2") as service:
        async with connect(service.address, retry=False) as channel:
            stub = GRPCInferenceServiceStub(channel)
            await infer(stub)
            start = time.perf_counter()
            await asyncio.gather(*(infer(stub) for _ in range(4)))
            cost = (time.perf_counter() - start) / 4  # seconds per request
            answered.clear()
            tasks, due = set[asyncio.Task[None]](), time.perf_counter()
            end = due + seconds
            while due < end:
                tasks.add(asyncio.create_task(infer(stub)))
                due += cost / 10
                await asyncio.sleep(max(0, due - time.perf_counter()))
                if len(tasks) % (int(seconds / cost * 10) // 5) == 0:
                    sizes.append(service.size()[0])
            await asyncio.gather(*tasks)
    measured = f"{len(answered)} answered, p99 {np.percentile(answered, 99):.2f} s; {len(refused)} refused, median "
    measured += (
        f"{statistics.median(refused) * 1e3:.1f} ms; other codes: {dict(lost) or 0}; {', '.join(f'{s:.0f}' for s in sizes)} MB"
    )
    name = f"ten times the possible load, {10 / cost:.0f} requests/s of {cost * 1e3:.0f} ms each, {seconds:g} s"
    print_row(name, measured, f"p99 <= {2 + 2 * cost:.2f} s, the rest RESOURCE_EXHAUSTED in < 5 ms, memory flat")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty SETTINGS


async def abuse(address: str, count: int) -> None:
    """Open idle and half-open connections, read slowly, and cancel at any time; close everything at the end."""
    host, port = address.rsplit(":", 1)
    raw = [socket.create_connection((host, int(port))) for _ in range(count)]
    for i, connection in enumerate(raw):
        connection.send((PREFACE, b"", PREFACE[:9], PREFACE + b"\0\0\x20\1")[i % 4])  # idle, silent, two that stop halfway
    channels = [connect(address) for _ in range(20)]
    slow = [FizzBuzzStub(channel).Count(CountRequest(start=1, stop=2**62)) for channel in channels for _ in range(5)]
    await asyncio.gather(*(call.read() for call in slow))
    request = build_request(read_card(MODELS / "mnist"), 16)
    stubs = [GRPCInferenceServiceStub(channel) for channel in channels]

    async def call_and_cancel(i: int) -> None:
        call = stubs[i % len(stubs)].ModelInfer(request)
        await asyncio.sleep(random.expovariate(50))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    for batch in range(0, 2 * count, 100):
        await asyncio.gather(*(call_and_cancel(i) for i in range(batch, batch + 100)))
    for call in slow:
        call.cancel()
    await asyncio.gather(*(channel.close() for channel in channels))
    for connection in raw:
        connection.close()


async def leaks(_seconds: float, count: int) -> None:
    """Abuse the service repeatedly."""
    sizes = list[tuple[float, int, int]]()
    with running() as service:
        for _ in range(4):
            await abuse(service.address, count)
            tally = Tally()
            async with loaded(service.address, lambda tally=tally: tally, rate=200):  # type: ignore[misc]
                await asyncio.sleep(2)
            for _ in range(20):  # closed connections end when their bytes are read
                await asyncio.sleep(0.5)
                size = service.size()
                if sizes and size[1] <= sizes[0][1]:
                    break
            sizes.append(size)
    after = ", ".join(f"{megabytes:.1f} MB / {fds} / {threads}" for megabytes, fds, threads in sizes)
    name = f"{count} idle and half-open connections, 100 slow readers, {2 * count} cancelled calls, 4 times"
    print_row(name, f"memory / descriptors / threads after each: {after}", "as after the first")


async def soak(seconds: float, _count: int) -> None:
    """Run at half the possible load for a long time."""
    tally, sizes = Tally(), list[float]()
    with running() as service:
        async with loaded(service.address, lambda: tally):
            await asyncio.sleep(1)
            warm = len(tally.seconds)
            await asyncio.sleep(4)
        rate = (len(tally.seconds) - warm) / 4 / 2
        async with loaded(service.address, lambda: tally, rate=rate):
            for _ in range(10):
                await asyncio.sleep(seconds / 10)
                sizes.append(service.size()[0])
    measured = f"{tally}; {', '.join(f'{size:.1f}' for size in sizes)} MB ({sizes[-1] / sizes[0] - 1:+.1%})"
    print_row(f"soak at half load, {rate:.0f} requests/s, {seconds:g} s", measured, "within 2 %, no error")


async def executed_rows(channel: grpc.aio.Channel, model: str) -> int:
    """Return how many rows a model has run."""
    response = await GRPCInferenceServiceStub(channel).ModelStatistics(ModelStatisticsRequest(name=model))
    return int(response.model_stats[0].inference_count)


async def never(_seconds: float, count: int) -> None:
    """Send requests whose deadline passes, or that are cancelled, in the queue; and some whose deadline has passed already."""
    card = read_card(MODELS / "mnist")
    large, small = build_request(card, LARGE), build_request(card, 1)
    abandoned, rows, discarded = 0, 0, 0
    with running() as service:
        async with connect(service.address, retry=False) as busy, connect(service.address, retry=False) as channel:
            while abandoned < count:
                before = await executed_rows(channel, "mnist")
                blocking = [asyncio.ensure_future(GRPCInferenceServiceStub(busy).ModelInfer(large)) for _ in range(3)]
                while await asyncio.to_thread(queued_rows, service, "mnist") < LARGE:
                    pass
                ended = await asyncio.gather(*(abandon(channel, small, by_deadline=i % 2 == 0) for i in range(250)))
                valid = not blocking[-1].done()
                await asyncio.gather(*blocking)
                if valid:
                    abandoned, rows = abandoned + sum(ended), rows + await executed_rows(channel, "mnist") - before - 3 * LARGE
                else:
                    discarded += 1
            expired = await send_expired(service.address, channel, small, count)
    print_row(f"{abandoned} cancelled or expired while queued", f"{rows} executions ({discarded} rounds discarded)", "0 executions")
    print_row(f"{count} whose deadline had passed when they came", expired, "0 executions")


async def abandon(channel: grpc.aio.Channel, request: ModelInferRequest, *, by_deadline: bool) -> bool:
    """Send a request that expires or is cancelled soon; return whether it ended so."""
    call = GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=0.05 if by_deadline else None)
    if not by_deadline:
        asyncio.get_running_loop().call_later(0.05 * random.random(), call.cancel)  # noqa: S311  not a secret
    code = await call.code()
    return bool(code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED))


async def send_expired(address: str, channel: grpc.aio.Channel, request: ModelInferRequest, count: int) -> str:
    """Send requests that a gRPC client would not send any more, with h2load."""
    if not shutil.which("h2load"):
        return "not run: h2load is not installed"
    before, load = await executed_rows(channel, request.model_name), Load(request=request, requests=count)
    await asyncio.to_thread(drive_with_h2load, address, load, "grpc-timeout: 1n")
    return f"{await executed_rows(channel, request.model_name) - before} executions"


ROWS: dict[str, tuple[Callable[[float, int], Awaitable[None]], float, int]] = {  # default seconds and count, 0 where unused
    "kill": (kill, 60, 0),
    "restart": (restart, 60, 0),
    "sigterm": (sigterm, 0, 5),
    "overload": (overload, 60, 0),
    "reload": (reload, 60, 100),
    "leaks": (leaks, 0, 1000),
    "soak": (soak, 1800, 0),
    "never": (never, 0, 10_000),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("rows", nargs=-1, type=click.Choice([*ROWS]))
@click.option("--seconds", type=float, help="Duration of a row, instead of its default.")
@click.option("--count", type=int, help="Number of repetitions, instead of the row's default.")
def main(rows: Sequence[str], seconds: float | None, count: int | None) -> None:
    """Print the table, or only some ROWS of it."""
    for name in rows or ROWS:
        print(f"{name}, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
        measure, default_seconds, default_count = ROWS[name]
        asyncio.run(measure(seconds or default_seconds, count or default_count))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
