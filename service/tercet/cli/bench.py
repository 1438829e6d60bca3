"""`tercet bench`: benchmarks/load.py of a checkout as a command."""

import sys
from pathlib import Path

import click

from tercet.cli.options import COUNT, CliError, complete_models, models_option, require, unknown_model


@click.command()
@click.argument("model", default="fizzbuzz", shell_complete=complete_models)
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
    checkout = next((root for root in (Path.cwd(), folder.resolve().parent) if (root / "benchmarks/load.py").is_file()), None)
    if not checkout:
        raise CliError("no benchmarks/load.py here or next to --models: run `tercet bench` from a checkout of the repository")
    sys.path.append(str(checkout))
    with require("serve,bench"):
        import grpc  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import Progress  # noqa: PLC0415

        from benchmarks import load  # noqa: PLC0415
        from tercet.card import find_models, read_card  # noqa: PLC0415
        from tercet.cli.render import histogram  # noqa: PLC0415
    if model not in (names := find_models(folder)):
        raise unknown_model(model, names)
    card = read_card(folder / model)
    work = load.Load(request=load.build_request(card, rows), requests=requests, in_flight=in_flight, connections=min(4, in_flight))
    servers = {
        "tercet": [sys.argv[0], "serve", "--port", "0", "--models", str(folder), "--workers", str(workers)],
        "echo": [sys.executable, "-P", str(checkout / "benchmarks/load.py")],
    }
    try:
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(model, total=(1 + rounds) * len(servers))
            results = load.compare(servers, work, rounds, lambda: progress.advance(task))
    except (RuntimeError, grpc.RpcError) as error:
        raise CliError(error.details() if isinstance(error, grpc.Call) else str(error)) from None
    results["session.run"] = load.session_run(folder / model, card, rows)
    click.echo(load.table(results, rows))
    for name, result in results.items():
        click.echo(f"\n{name}, ms: {load.quantiles(result.latencies_ms)}\n{histogram(result.latencies_ms)}")
