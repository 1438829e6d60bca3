"""What the service does when things go wrong, measured from outside: `python benchmarks/faults.py`, with trained models.

    python benchmarks/faults.py                       # every row, about an hour
    python benchmarks/faults.py kill --seconds 10     # one row, shorter

Each row starts a service of its own. Load comes from this process, over connections of their own, and every answer is checked.
README.md beside this file has what was measured, and where.
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
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tercet.card import read_card
from tercet.client import OPTIONS
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelInferRequest, ModelStatisticsRequest, RepositoryModelLoadRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.load import METHOD, build_request

MODELS = Path("models")
SERVING = health_pb2.HealthCheckResponse.SERVING
WORKERS = health_pb2.HealthCheckRequest(service="workers")
RATE = 500  # requests a second of a load that leaves room
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
        below = psutil.Process(self.process.pid).children()
        return [each for each in below if each.status() != psutil.STATUS_ZOMBIE] or [psutil.Process(self.process.pid)]

    def size(self) -> tuple[float, int, int]:
        """Proportional set size in MB, file descriptors and threads, of all processes."""
        found = {psutil.Process(self.process.pid), *self.workers}
        pss = sum(each.memory_full_info().pss for each in found) / 1e6
        return pss, sum(each.num_fds() for each in found), sum(each.num_threads() for each in found)


@contextmanager
def started(*flags: str, models: Path = MODELS) -> Iterator[Running]:
    """A service on a free port."""
    command = [str(Path(sys.executable).with_name("tercet"))]
    command += ["serve", "--port", "0", "--metrics-port", "0", "--models", str(models), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603
        lines = [process.stdout.readline() if process.stdout else "" for _ in range(2)]
        if " at " not in lines[0]:
            raise click.ClickException(f"{' '.join(command)} did not start")
        try:
            yield Running(process, *(line.rsplit(" at ", 1)[1].strip() for line in lines))
        finally:
            process.terminate()


def connect(address: str, *, again: bool = True) -> grpc.aio.Channel:
    """A channel with a connection of its own; `again` takes our client's retry policy."""
    options = {**(OPTIONS if again else {"grpc.enable_retries": 0}), "grpc.use_local_subchannel_pool": 1}
    return grpc.aio.insecure_channel(address, list(options.items()))


@dataclass
class Tally:
    """How calls went."""

    wrong: int = 0
    seconds: list[float] = field(default_factory=list)  # of those that were answered rightly
    lost: Counter[str] = field(default_factory=Counter)  # by code

    def __str__(self) -> str:
        """In words."""
        lost = ", ".join(f"{count} {code}" for code, count in sorted(self.lost.items())) or "0"
        return f"{len(self.seconds)} answered, {self.wrong} wrong, lost: {lost}"


async def say(stub: Any, tally: Tally) -> None:
    """Ask for a few words, and check them."""
    numbers = [random.randrange(1024) for _ in range(4)]  # noqa: S311  no secret
    right = ["fizz" * (n % 3 == 0) + "buzz" * (n % 5 == 0) or str(n) for n in numbers]
    begun = time.perf_counter()
    try:
        words = list((await stub.Answer(AnswerRequest(numbers=numbers), timeout=30)).words)
    except grpc.aio.AioRpcError as error:
        tally.lost[error.code().name] += 1
        await asyncio.sleep(0.01)
        return
    if words != right:
        tally.wrong += 1
    else:
        tally.seconds.append(time.perf_counter() - begun)


@asynccontextmanager
async def load(
    address: str, tally: Callable[[], Tally], *, callers: int = 32, rate: float = 0, again: bool = True
) -> AsyncIterator[None]:
    """Callers that ask all the time, or at `rate` requests a second in all, over 8 connections; `tally` says where to count."""
    channels = [connect(address, again=again) for _ in range(min(8, callers))]

    async def caller(stub: Any) -> None:
        due = time.perf_counter() + random.random() * callers / (rate or 1)  # noqa: S311  no secret
        while True:
            if rate:
                await asyncio.sleep(max(0, due - time.perf_counter()))
                due += callers / rate
            await say(stub, tally())

    tasks = [asyncio.create_task(caller(FizzBuzzStub(channels[i % len(channels)]))) for i in range(callers)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in channels))


def row(what: str, found: str, bound: str) -> None:
    """Print a row of the table."""
    print(f"| {what} | {found} | {bound} |", flush=True)


async def kill(seconds: float, _count: int) -> None:
    """Kill a worker every 2 s."""
    await replace(seconds, signal.SIGKILL, "killed")


async def restart(seconds: float, _count: int) -> None:
    """Ask a worker to end every 2 s, as one that is restarted."""
    await replace(seconds, signal.SIGTERM, "sent SIGTERM")


async def replace(seconds: float, number: signal.Signals, what: str) -> None:
    """End a worker every 2 s."""
    tally, replaced = Tally(), []
    with started("--workers", "2") as service:
        async with load(service.address, lambda: tally, rate=RATE), connect(service.address) as channel:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                await asyncio.sleep(2)
                victim = min(service.workers, key=lambda each: each.create_time())
                victim.send_signal(number)
                await asyncio.to_thread(victim.wait)  # who was not killed drains first
                begun = time.monotonic()
                while len(service.workers) < 2 or not await all_run(channel):  # noqa: PLR2004
                    await asyncio.to_thread(time.sleep, 0.02)
                replaced.append(time.monotonic() - begun)
    found = f"{len(replaced)} times; {tally}; replaced in {statistics.median(replaced):.2f} s, at most {max(replaced):.2f}"
    row(f"a worker of two is {what} every 2 s for {seconds:g} s under {RATE} requests/s", found, "0 wrong, 0 lost, < 1 s")


async def all_run(channel: grpc.aio.Channel) -> bool:
    """What health says of the workers."""
    return bool((await health_pb2_grpc.HealthStub(channel).Check(WORKERS, timeout=30)).status == SERVING)


def waiting(service: Running, model: str) -> float:
    """Rows that wait, as Prometheus is told."""
    with urllib.request.urlopen(service.metrics) as response:  # noqa: S310  our own
        found = re.search(rf'^tercet_queue_rows{{model="{model}"}} (\S+)', response.read().decode(), flags=re.MULTILINE)
    return float(found[1]) if found else 0


async def sigterm(_seconds: float, count: int) -> None:
    """SIGTERM with 32 requests in the engine and 100 in the queue, while others go on asking."""
    card = read_card(MODELS / "mnist")
    request, right = build_request(card, 64), np.array([example.output for example in card.examples])
    accepted, others, codes, order = Tally(), Tally(), Counter[int](), 0
    ends, opened = list[float](), list[int]()
    while len(opened) < count:
        with started() as service:
            async with (
                load(service.address, lambda: others, callers=16, again=False),
                connect(service.address, again=False) as channel,
            ):
                stub = GRPCInferenceServiceStub(channel)
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                await watch.read()
                calls = [stub.ModelInfer(each) for each in (build_request(card, LARGE), *[request] * 132)]
                while await asyncio.to_thread(waiting, service, "mnist") < 132 * 64 and not all(call.done() for call in calls):
                    pass
                open_ = sum(not call.done() for call in calls)
                if open_ < len(calls):  # the large one, that holds the engine, was over before all others had come: once more
                    continue
                service.process.send_signal(signal.SIGTERM)
                begun, before = time.monotonic(), others.lost.total()
                await watch.read()
                order += others.lost.total() == before
                opened.append(open_)
                for call in calls:
                    try:
                        answers = np.frombuffer((await call).raw_output_contents[0], np.float32).reshape(-1, 10)
                        accepted.seconds.append(0)
                        accepted.wrong += not np.allclose(answers, np.resize(right, answers.shape), atol=1e-4)
                    except grpc.aio.AioRpcError as error:
                        accepted.lost[error.code().name] += 1
                codes[await asyncio.to_thread(service.process.wait)] += 1
                ends.append(time.monotonic() - begun)
    exits = ", ".join(f"{times} x exit {code}" for code, times in codes.items())
    found = f"those sent before: {accepted}; at least {min(opened)} were open; health first {order} of {count}; {exits}"
    found += f", after at most {max(ends):.1f} s"
    row(f"SIGTERM under load, 32 in flight, 100 queued, {count} times", found, "0 lost, health first, exit 0 within 30 s")
    row("the calls that came after it, without a retry policy", str(others), "UNAVAILABLE only")


async def reload(seconds: float, count: int) -> None:
    """Reload a model under load, alternating with stretches without."""
    calm, busy, failed, turns = Tally(), Tally(), 0, 10
    now = [calm]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(shutil.copytree(MODELS / "fizzbuzz", Path(folder, "fizzbuzz")))
        with started("--watch", "0", models=Path(folder)) as service:
            async with load(service.address, lambda: now[0], rate=RATE), connect(service.address) as channel:
                stub = GRPCInferenceServiceStub(channel)
                await asyncio.sleep(2)
                calm.seconds.clear()
                before = service.size()[0]
                for turn in range(2 * turns):
                    now[0] = busy if turn % 2 else calm
                    if not turn % 2:
                        await asyncio.sleep(seconds / turns)
                        continue
                    for _ in range(count // turns):
                        begun = time.perf_counter()
                        os_touch(home / "card.json")
                        failed += await fails(stub.RepositoryModelLoad(RepositoryModelLoadRequest(model_name="fizzbuzz")))
                        await asyncio.sleep(max(0, seconds / count - time.perf_counter() + begun))
                after = service.size()[0]
    tails = [np.percentile(tally.seconds, [50, 99]) * 1e3 for tally in (calm, busy)]
    lost = sum(tally.lost.total() + tally.wrong for tally in (calm, busy))
    p99 = f"p50/p99 {tails[0][0]:.1f}/{tails[0][1]:.1f} ms without, {tails[1][0]:.1f}/{tails[1][1]:.1f} with"
    found = (
        f"{failed} refused, {lost} of {len(calm.seconds) + len(busy.seconds)} failed; {p99} ({tails[1][1] / tails[0][1] - 1:+.0%})"
    )
    row(
        f"{count} reloads under {RATE} requests/s, alternating, {seconds:g} s each way",
        f"{found}; {before:.0f} -> {after:.0f} MB",
        "0 failed, p99 +10 %",
    )


def os_touch(path: Path) -> None:
    """Put a card in place anew, as another commit's."""
    card = json.loads(path.read_text())
    card["git_commit"] = f"{random.getrandbits(160):040x}"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(card))
    new.replace(path)


async def fails(call: Awaitable[Any]) -> bool:
    """Whether a call ends with an error."""
    try:
        await call
    except grpc.aio.AioRpcError:
        return True
    return False


async def overload(seconds: float, _count: int) -> None:
    """Ten times the load that it can take, of requests that cost far more to run than to refuse."""
    request = build_request(read_card(MODELS / "fizzbuzz_any"), LARGE)
    answered, refused, sizes = list[float](), list[float](), list[float]()
    lost = Counter[str]()

    async def one(stub: Any) -> None:
        begun = time.perf_counter()
        try:
            await stub.ModelInfer(request, timeout=60)
            answered.append(time.perf_counter() - begun)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                refused.append(time.perf_counter() - begun)
            else:
                lost[error.code().name] += 1

    with started("--queue-timeout", "2") as service:
        async with connect(service.address, again=False) as channel:
            stub = GRPCInferenceServiceStub(channel)
            await one(stub)
            begun = time.perf_counter()
            await asyncio.gather(*(one(stub) for _ in range(4)))
            each = (time.perf_counter() - begun) / 4
            answered.clear()
            tasks, end = set[asyncio.Task[None]](), time.perf_counter() + seconds
            due = time.perf_counter()
            while due < end:
                tasks.add(asyncio.create_task(one(stub)))
                due += each / 10
                await asyncio.sleep(max(0, due - time.perf_counter()))
                if len(tasks) % (int(seconds / each * 10) // 5) == 0:
                    sizes.append(service.size()[0])
            await asyncio.gather(*tasks)
    found = f"{len(answered)} answered, p99 {np.percentile(answered, 99):.2f} s; {len(refused)} refused"
    memory = ", ".join(f"{size:.0f}" for size in sizes)
    found += f", median {statistics.median(refused) * 1e3:.1f} ms; other codes: {dict(lost) or 0}; {memory} MB"
    what = f"ten times the load it can take, {10 / each:.0f} requests/s of {each * 1e3:.0f} ms each, {seconds:g} s"
    row(what, found, f"p99 <= {2 + 2 * each:.2f} s, the rest RESOURCE_EXHAUSTED in < 5 ms, memory flat")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty SETTINGS


async def abuse(address: str, count: int) -> None:
    """Idle and half-open connections, slow readers, and clients that leave at any time; all of them are gone at the end."""
    host, port = address.rsplit(":", 1)
    raw = [socket.create_connection((host, int(port))) for _ in range(count)]
    for i, connection in enumerate(raw):
        connection.send((PREFACE, b"", PREFACE[:9], PREFACE + b"\0\0\x20\1")[i % 4])  # idle, silent, two that stop midway
    channels = [connect(address) for _ in range(20)]
    slow = [FizzBuzzStub(channel).Count(CountRequest(start=1, stop=2**62)) for channel in channels for _ in range(5)]
    await asyncio.gather(*(call.read() for call in slow))
    card = read_card(MODELS / "mnist")
    stubs = [(GRPCInferenceServiceStub(channel), build_request(card, 16)) for channel in channels]

    async def leaver(i: int) -> None:
        stub, request = stubs[i % len(stubs)]
        call = stub.ModelInfer(request)
        await asyncio.sleep(random.expovariate(50))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    for batch in range(0, 2 * count, 100):
        await asyncio.gather(*(leaver(i) for i in range(batch, batch + 100)))
    for call in slow:
        call.cancel()
    await asyncio.gather(*(channel.close() for channel in channels))
    for connection in raw:
        connection.close()


async def leaks(_seconds: float, count: int) -> None:
    """Abuse the service, again and again."""
    sizes = list[tuple[float, int, int]]()
    with started() as service:
        for _ in range(4):
            await abuse(service.address, count)
            tally = Tally()
            async with load(service.address, lambda tally=tally: tally, rate=200):  # type: ignore[misc]
                await asyncio.sleep(2)
            for _ in range(20):  # connections that were left end when their bytes are read
                await asyncio.sleep(0.5)
                size = service.size()
                if sizes and size[1] <= sizes[0][1]:
                    break
            sizes.append(size)
    told = ", ".join(f"{pss:.1f} MB / {fds} / {threads}" for pss, fds, threads in sizes)
    what = f"{count} idle and half-open connections, 100 slow readers, {2 * count} clients that leave, 4 times"
    row(what, f"memory / descriptors / threads after each: {told}", "as after the first")


async def soak(seconds: float, _count: int) -> None:
    """Half the load that it can take, for long."""
    tally, sizes = Tally(), list[float]()
    with started() as service:
        async with load(service.address, lambda: tally):
            await asyncio.sleep(1)
            warm = len(tally.seconds)
            await asyncio.sleep(4)
        rate = (len(tally.seconds) - warm) / 4 / 2
        async with load(service.address, lambda: tally, rate=rate):
            for _ in range(10):
                await asyncio.sleep(seconds / 10)
                sizes.append(service.size()[0])
    found = f"{tally}; {', '.join(f'{size:.1f}' for size in sizes)} MB ({sizes[-1] / sizes[0] - 1:+.1%})"
    row(f"soak at half load, {rate:.0f} requests/s, {seconds:g} s", found, "within 2 %, no error")


async def executed(channel: grpc.aio.Channel, model: str) -> tuple[int, int]:
    """Rows and batches that a model has run."""
    stub = GRPCInferenceServiceStub(channel)
    [found] = (await stub.ModelStatistics(ModelStatisticsRequest(name=model))).model_stats
    return found.inference_count, found.execution_count


async def never(_seconds: float, count: int) -> None:
    """Requests whose deadline passes, or that are cancelled, while they wait; and some whose deadline has passed already."""
    card = read_card(MODELS / "mnist")
    large, small = build_request(card, LARGE), build_request(card, 1)
    left, rows, void = 0, 0, 0
    with started() as service:
        async with connect(service.address, again=False) as busy, connect(service.address, again=False) as channel:
            while left < count:
                before, _ = await executed(channel, "mnist")
                held = [asyncio.ensure_future(GRPCInferenceServiceStub(busy).ModelInfer(large)) for _ in range(3)]
                while await asyncio.to_thread(waiting, service, "mnist") < LARGE:
                    pass
                ended = await asyncio.gather(*(leave(channel, small, by_deadline=i % 2 == 0) for i in range(250)))
                valid = not held[-1].done()
                await asyncio.gather(*held)
                after, _ = await executed(channel, "mnist")
                if valid:
                    left, rows = left + sum(ended), rows + after - before - 3 * LARGE
                else:
                    void += 1
            at_once = await passed(service.address, channel, small, count)
    row(f"{left} cancelled or expired while queued", f"{rows} executions ({void} rounds did not count)", "0 executions")
    row(f"{count} whose deadline had passed when they came", at_once, "0 executions")


async def leave(channel: grpc.aio.Channel, request: ModelInferRequest, *, by_deadline: bool) -> bool:
    """Ask and be gone soon; whether it ended so."""
    call = GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=0.05 if by_deadline else None)
    if not by_deadline:
        asyncio.get_running_loop().call_later(0.05 * random.random(), call.cancel)  # noqa: S311  no secret
    code = await call.code()
    return bool(code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED))


async def passed(address: str, channel: grpc.aio.Channel, request: ModelInferRequest, count: int) -> str:
    """Send requests that a gRPC client would not send any more, with h2load."""
    if not shutil.which("h2load"):
        return "not run: h2load is not installed"
    before = await executed(channel, request.model_name)
    body = request.SerializeToString()
    with tempfile.NamedTemporaryFile() as frame:
        frame.write(b"\0" + len(body).to_bytes(4, "big") + body)
        frame.flush()
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers", "-H", "grpc-timeout: 1n"]
        command = ["h2load", "-n", str(count), "-c", "4", "-m", "8", "-d", frame.name, *headers, f"http://{address}{METHOD}"]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    after = await executed(channel, request.model_name)
    return f"{after[0] - before[0]} executions"


ROWS: dict[str, tuple[Callable[[float, int], Awaitable[None]], float, int]] = {  # with seconds and count, where they mean something
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
@click.option("--seconds", type=float, help="How long a row lasts, instead of as long as the issue wants.")
@click.option("--count", type=int, help="How often it is done, likewise.")
def main(rows: Sequence[str], seconds: float | None, count: int | None) -> None:
    """Print the table, or only some ROWS of it."""
    for name in rows or ROWS:
        print(f"{name}, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
        measure, usual_seconds, usual_count = ROWS[name]
        asyncio.run(measure(seconds or usual_seconds, count or usual_count))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
