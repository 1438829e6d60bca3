"""The figures that tercet's serving is held to: `python benchmarks/serving.py`, on an otherwise idle machine, with trained models.

Ratios are taken between medians of alternating rounds of one run. README.md beside this file has what was measured, where, and what
was tried on the way.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import psutil
from tercet.card import read_card

from benchmarks.load import Load, Result, build_request, compare, session_run

MODELS = Path("models")
SERVE = [str(Path(sys.executable).with_name("tercet")), "serve", "--port", "0", "--models", str(MODELS)]
ECHO = [sys.executable, "-m", "benchmarks.load"]


def load(model: str, rows: int, requests: int, in_flight: int = 32) -> Load:
    """A load on one model; at most 100 requests in flight a connection."""
    connections = min(in_flight, max(4, in_flight // 100))
    request = build_request(read_card(MODELS / model), rows)
    return Load(request=request, requests=requests, in_flight=in_flight, connections=connections)


def alone(model: str, rows: int) -> Result:
    """The bare engine."""
    return session_run(MODELS / model, read_card(MODELS / model), rows)


def say(number: int, what: str, found: str, bound: str) -> None:
    """Print one figure."""
    print(f"{number}  {what:46} {found:34} bound {bound}", flush=True)


def cpu_beside_echo(number: int, model: str, rows: int, rounds: int) -> None:
    """Figures 1 to 3: CPU time a request beside a server that does nothing."""
    found = compare({"tercet": SERVE, "echo": ECHO}, load(model, rows, 5000), rounds)
    ours, floor = found["tercet"].cpu_us, found["echo"].cpu_us
    bound = 1.25 * floor + (1.1 * alone(model, 16).cpu_us / 16 if model == "mnist" else 0)
    say(number, f"{model}, {rows} rows, 32 in flight", f"{ours:.0f} us, echo {floor:.0f} ({ours / floor:.2f} x)", f"{bound:.0f} us")


def rows_beside_session(rounds: int) -> None:
    """Figure 4: throughput of large requests beside the bare engine; both before and after, as the machine's speed drifts."""
    before = alone("mnist", 256)
    ours = compare({"tercet": SERVE}, load("mnist", 256, 300), rounds)["tercet"].requests_per_second
    floor = (before.requests_per_second + alone("mnist", 256).requests_per_second) / 2
    say(4, "mnist, 256 rows: rows/s", f"{ours * 256:.0f}, session.run {floor * 256:.0f} ({ours / floor:.2f} x)", "0.93 x")


def start_and_memory(rounds: int) -> None:
    """Figures 5 and 6: seconds until the first line is printed, and proportional set size then."""
    seconds, megabytes = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        with subprocess.Popen(SERVE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603
            if process.stdout and process.stdout.readline():
                seconds.append(time.perf_counter() - begun)
                megabytes.append(psutil.Process(process.pid).memory_full_info().pss / 1e6)
            process.terminate()
    say(5, "process start to ready", f"{sorted(seconds)[rounds // 2]:.2f} s", "0.8 s")
    say(6, "memory of one worker after load (PSS)", f"{sorted(megabytes)[rounds // 2]:.0f} MB", "110 MB")


def in_flight(rounds: int, counts: Sequence[int] = (1, 32, 1000)) -> None:
    """Figure 7: CPU time a request and latency, from one request in flight to a thousand."""
    found = {count: compare({"tercet": SERVE}, load("fizzbuzz", 1, 4000, count), rounds)["tercet"] for count in counts}
    cpu = ", ".join(f"{result.cpu_us:.0f}" for result in found.values())
    say(7, f"fizzbuzz, {' / '.join(map(str, counts))} in flight: CPU", f"{cpu} us", "within 15 % or falling")
    tail = ", ".join(f"{result.p50_ms:.2f} / {result.p99_ms:.2f}" for result in found.values())
    say(7, "the same: p50 / p99", f"{tail} ms", "-")


def two_workers(rounds: int) -> None:
    """Figure 8: requests a second with one and with two workers."""
    for model in ("fizzbuzz", "mnist"):
        commands = {str(count): [*SERVE, "--workers", str(count)] for count in (1, 2)}
        found = compare(commands, load(model, 1, 5000), rounds)
        one, two = found["1"].requests_per_second, found["2"].requests_per_second
        say(8, f"{model}, two workers", f"{two:.0f} requests/s, one {one:.0f} ({two / one:.2f} x)", "more than 1 x")


def metrics(rounds: int) -> None:
    """Figure 9: what it costs to keep histograms."""
    found = compare({"off": SERVE, "on": [*SERVE, "--metrics-port", "0"]}, load("fizzbuzz", 1, 5000), rounds)
    on, off = found["on"].cpu_us, found["off"].cpu_us
    say(9, "fizzbuzz, 1 row: histograms on", f"{on:.0f} us, off {off:.0f} ({on / off - 1:+.1%})", "+3 %")


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Print every figure beside its bound."""
    for number, (model, rows) in enumerate((("fizzbuzz", 1), ("fizzbuzz", 64), ("mnist", 1)), start=1):
        cpu_beside_echo(number, model, rows, rounds)
    rows_beside_session(rounds)
    start_and_memory(rounds)
    in_flight(rounds)
    two_workers(rounds)
    metrics(2 * rounds)


if __name__ == "__main__":
    main()
