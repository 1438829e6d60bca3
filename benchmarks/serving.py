"""The serving figures and their bounds: `python -m benchmarks.serving`, on an otherwise idle machine, with trained models.

Ratios are between medians of alternating rounds of one run. README.md in this folder has the measured figures.
"""

import subprocess
import time
from collections.abc import Sequence

import click
from tercet.card import read_card

from benchmarks.load import ECHO, MODELS, Load, Result, build_request, compare, pss_megabytes, serve, session_run


def load(model: str, rows: int, requests: int, in_flight: int = 32) -> Load:
    """Return a load on one model, with at most 100 requests in flight per connection."""
    connections = min(in_flight, max(4, in_flight // 100))
    request = build_request(read_card(MODELS / model), rows)
    return Load(request=request, requests=requests, in_flight=in_flight, connections=connections)


def session(model: str, rows: int) -> Result:
    return session_run(MODELS / model, read_card(MODELS / model), rows)


def print_figure(number: int, name: str, measured: str, bound: str) -> None:
    print(f"{number}  {name:46} {measured:34} bound {bound}", flush=True)


def cpu_against_echo(number: int, model: str, rows: int, rounds: int) -> None:
    """Figures 1 to 3: CPU time per request, compared with a server that does nothing."""
    results = compare({"tercet": serve(), "echo": ECHO}, load(model, rows, 5000), rounds)
    cpu, echo = results["tercet"].cpu_us, results["echo"].cpu_us
    bound = 1.25 * echo + (1.1 * session(model, 16).cpu_us / 16 if model == "mnist" else 0)
    print_figure(
        number, f"{model}, {rows} rows, 32 in flight", f"{cpu:.0f} us, echo {echo:.0f} ({cpu / echo:.2f} x)", f"{bound:.0f} us"
    )


def rows_against_session(rounds: int) -> None:
    """Figure 4: throughput of large requests, compared with the engine alone before and after, as the machine's speed drifts."""
    before = session("mnist", 256)
    rate = compare({"tercet": serve()}, load("mnist", 256, 300), rounds)["tercet"].requests_per_second
    bound = (before.requests_per_second + session("mnist", 256).requests_per_second) / 2
    print_figure(4, "mnist, 256 rows: rows/s", f"{rate * 256:.0f}, session.run {bound * 256:.0f} ({rate / bound:.2f} x)", "0.93 x")


def start_and_memory(rounds: int) -> None:
    """Figures 5 and 6: seconds until the first line is printed, and proportional set size at that point."""
    seconds, megabytes = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with subprocess.Popen(serve(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603
            if process.stdout and process.stdout.readline():
                seconds.append(time.perf_counter() - start)
                megabytes.append(pss_megabytes(process.pid))
            process.terminate()
    print_figure(5, "process start to ready", f"{sorted(seconds)[rounds // 2]:.2f} s", "0.8 s")
    print_figure(6, "memory of one worker after load (PSS)", f"{sorted(megabytes)[rounds // 2]:.0f} MB", "110 MB")


def in_flight(rounds: int, counts: Sequence[int] = (1, 32, 1000)) -> None:
    """Figure 7: CPU time per request and latency, from one request in flight to a thousand."""
    results = [compare({"tercet": serve()}, load("fizzbuzz", 1, 4000, count), rounds)["tercet"] for count in counts]
    cpu = ", ".join(f"{result.cpu_us:.0f}" for result in results)
    print_figure(7, f"fizzbuzz, {' / '.join(map(str, counts))} in flight: CPU", f"{cpu} us", "within 15 % or falling")
    latency = ", ".join(f"{result.p50_ms:.2f} / {result.p99_ms:.2f}" for result in results)
    print_figure(7, "the same: p50 / p99", f"{latency} ms", "-")


def two_workers(rounds: int) -> None:
    """Figure 8: requests per second with one and with two workers."""
    for model in ("fizzbuzz", "mnist"):
        results = compare({str(count): serve("--workers", str(count)) for count in (1, 2)}, load(model, 1, 5000), rounds)
        one, two = results["1"].requests_per_second, results["2"].requests_per_second
        print_figure(8, f"{model}, two workers", f"{two:.0f} requests/s, one {one:.0f} ({two / one:.2f} x)", "more than 1 x")


def metrics(rounds: int) -> None:
    """Figure 9: the cost of Prometheus metrics."""
    results = compare({"off": serve(), "on": serve("--metrics-port", "0")}, load("fizzbuzz", 1, 5000), rounds)
    on, off = results["on"].cpu_us, results["off"].cpu_us
    print_figure(9, "fizzbuzz, 1 row: histograms on", f"{on:.0f} us, off {off:.0f} ({on / off - 1:+.1%})", "+3 %")


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Print every figure and its bound."""
    for number, (model, rows) in enumerate((("fizzbuzz", 1), ("fizzbuzz", 64), ("mnist", 1)), start=1):
        cpu_against_echo(number, model, rows, rounds)
    rows_against_session(rounds)
    start_and_memory(rounds)
    in_flight(rounds)
    two_workers(rounds)
    metrics(2 * rounds)


if __name__ == "__main__":
    main()
