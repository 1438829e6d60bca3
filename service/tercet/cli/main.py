"""The command `tercet`."""

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Any

import click
import grpc
import msgspec
from click.core import ParameterSource
from click.shell_completion import get_completion_class

from tercet.cli import predict as predict_
from tercet.cli import render as terminal
from tercet.cli.options import (
    COUNT,
    DEFAULT_SERVER,
    FILE,
    FOLDER,
    Refusal,
    Tercet,
    calls,
    complete_models,
    complete_values,
    settings,
)
from tercet.client import Client
from tercet.errors import StartupError
from tercet.server import logs
from tercet.server.config import Config

INT64 = click.IntRange(predict_.INT64[0], predict_.INT64[-1])
TRY = {
    "mnist": "predict mnist examples/seven.png --draw",
    "diabetes": "predict diabetes glucose=148 bmi=33.6 age=50",
    "fizzbuzz": "fizzbuzz 1 30",
}


@click.group(cls=Tercet, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("tercet"), prog_name="tercet")
def main() -> None:
    """Small models behind one gRPC service.

    \b
    Examples:
      tercet serve
      tercet predict mnist 'digits/*.png' --draw
      tercet predict diabetes --input patients.csv --output csv
      tercet fizzbuzz 1 100

    \b
    Exit codes:
      0    done
      1    what was asked cannot be; the sentence on stderr says why
      2    the command line is wrong
      3    the service cannot be reached or is busy: try again later
      4    the service does not accept the caller: --token, --tls-*
      130  Ctrl-C
      141  whoever read the output has gone, as in `tercet ... | head`

    Settings of a client may come from TERCET_SERVER, TERCET_TOKEN and so on; each command's --help names them.
    """  # noqa: D301  \b is click's mark for text that keeps its lines


@main.command()
@settings
def serve(**options: Any) -> None:
    """Serve the trained models until SIGTERM or Ctrl-C.

    \b
    Examples:
      tercet serve
      tercet serve --engine torch --device cuda
      tercet serve --workers 2 --port 0 --metrics-port 0
    """  # noqa: D301
    logs.configure(options["log_format"])
    try:
        import uvloop  # noqa: PLC0415  the other commands do without the server's packages

        config = Config(**options)
        if config.workers == 1:
            from tercet.server.app import serve as run  # noqa: PLC0415
        else:
            from tercet.server.workers import serve as run  # noqa: PLC0415
        uvloop.run(run(config, announce))
    except ImportError as error:
        raise Refusal(f"serving needs more packages: pip install 'tercet[serve]' ({error})") from None
    except StartupError as error:
        raise Refusal(str(error)) from None


def announce(config: Config, engines: Mapping[str, str]) -> None:
    """Say what is served where, with what, once calls are accepted, and what to try next."""
    click.echo(f"tercet {version('tercet')} serves {', '.join(engines)} at {config.address}")
    if config.metrics_port is not None:
        click.echo(f"metrics at http://{config.host}:{config.metrics_port}/metrics")
    click.echo(terminal.table([(f"  {name}", engine) for name, engine in engines.items()]))
    if config.workers > 1:
        click.echo(f"each in {config.workers} processes")
    address = f"HOST:{config.port}" if config.tls_key else config.address  # a certificate is for names
    needed = {
        "SERVER": address if address != DEFAULT_SERVER else None,
        "TLS_CA": "CA.pem" if config.tls_key else None,
        "CLIENT_CERTIFICATE": "YOURS.pem" if config.tls_client_ca else None,
        "CLIENT_KEY": "YOURS.key" if config.tls_client_ca else None,
        "TOKEN": "TOKEN" if config.token_file else None,
    }
    click.echo("try:")
    for name, value in needed.items():
        if value:
            click.echo(f"  export TERCET_{name}={value}")
    for example in [TRY[name] for name in TRY if name in engines] or [f"models {next(iter(engines))}"]:
        click.echo(f"  tercet {example}")


@main.command(context_settings={"ignore_unknown_options": True})  # a value may be negative
@calls
@click.argument("model", shell_complete=complete_models)
@click.argument("values", nargs=-1, shell_complete=complete_values)
@click.option("--input", "source", type=click.File("rb"), help="Ask what this file says, `-` for stdin.")
@click.option(
    "--format", "kind", type=click.Choice(list(predict_.READERS)), help="Of --input; else told by its suffix, lines for any other."
)
@click.option(
    "--output", type=click.Choice(["text", "json", "csv"]), default="text", show_default=True, help="json: one line each."
)
@click.option("--json", "output", flag_value="json", help="The same as --output json.")
@click.option("--draw", is_flag=True, help="Draw each digit in the terminal, with all probabilities.")
def predict(
    client: Client, model: str, values: tuple[str, ...], source: BufferedReader | None, kind: str | None, output: str, *, draw: bool
) -> None:
    """Ask the service for predictions.

    VALUES are files or quoted patterns for mnist (`-`: a picture on stdin), NAME=VALUE or all eight measurements for diabetes (`-`:
    not measured), numbers for fizzbuzz, a batch of rows in JSON for any other model. --input asks for each line of a file: words as
    above, a row of CSV with names as its header, or a JSON value; it may be of any length.

    \b
    Examples:
      tercet predict mnist seven.png 'digits/**/*.png' --draw
      tercet predict mnist - < seven.png
      tercet predict diabetes glucose=148 bmi=33.6 age=50
      tercet predict diabetes 6 148 72 35 - 33.6 0.627 50 --json
      tercet predict diabetes --input patients.csv --output csv
      seq 1 100 | tercet predict fizzbuzz --input -
      tercet predict fizzbuzz_any '[7, -15]'
    """  # noqa: D301
    if bool(values) == bool(source):
        raise click.UsageError("Give either values or --input FILE.")
    for value in values:
        if value.startswith("--"):
            raise click.NoSuchOption(value, possibilities=[name for each in predict.params for name in each.opts])
    face = predict_.FACES.get(model, predict_.Face)(model)
    if draw and (output != "text" or not isinstance(face, predict_.Digits)):
        raise click.UsageError("--draw draws the pictures of mnist, as text.")
    items = predict_.lines(face, source, kind) if source else predict_.arguments(face, values)
    write = predict_.as_drawing if draw else predict_.WRITERS[output]
    try:
        for line in write(face, predict_.answers(client, face, items)):
            click.echo(line)
    except predict_.WrongInputError as error:
        raise Refusal(str(error)) from None
    except ImportError as error:
        raise Refusal(f"drawing needs more packages: pip install 'tercet[serve]' ({error})") from None


@main.command(context_settings={"ignore_unknown_options": True})  # a step may be negative
@calls
@click.argument("start", type=INT64)
@click.argument("stop", type=INT64)
@click.argument("step", type=INT64, default=1)
def fizzbuzz(client: Client, start: int, stop: int, step: int) -> None:
    """Count from START to STOP, both included.

    \b
    Examples:
      tercet fizzbuzz 1 30
      tercet fizzbuzz 15 1 -2
    """  # noqa: D301
    for _, word in client.count(start, stop, step):
        click.echo(word)


@main.command()
@click.argument("name", required=False, shell_complete=complete_models)
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print cards as JSON, one line each, without their test rows.")
def models(name: str | None, folder: Path, *, as_json: bool) -> None:
    """List the models, or tell all about one.

    Of one: what it is for, a warning, units and ranges, figures, and where it comes from.

    \b
    Examples:
      tercet models
      tercet models diabetes
      tercet models --json | jq .metrics
    """  # noqa: D301
    from tercet.card import find_models, is_trained, read_card  # noqa: PLC0415

    try:
        names = [name] if name else find_models(folder)
        cards = {each: read_card(folder / each) if name or is_trained(folder / each) else None for each in names}
    except StartupError as error:
        raise Refusal(str(error)) from None
    if as_json:
        for each, card in cards.items():
            fields = msgspec.to_builtins(card) if card else {"name": each}
            click.echo(json.dumps({key: value for key, value in fields.items() if key != "examples"}, ensure_ascii=False))
    elif name and (card := cards[name]):
        click.echo(terminal.details(card))
    else:
        click.echo(terminal.overview(cards))


@main.command("export-triton")
@click.argument("target", metavar="DIR", type=Path)
@click.option("--backend", type=click.Choice(["onnxruntime", "python"]), default="onnxruntime", show_default=True)
@FOLDER
def export_triton(target: Path, backend: str, folder: Path) -> None:
    """Write a model repository of NVIDIA Triton.

    The trained models go into the new folder DIR.
    With --backend python Triton runs them with the onnxruntime of a Python of its version, where its own backend is not there.

    \b
    Examples:
      tercet export-triton triton
      tercet export-triton triton --backend python
    """  # noqa: D301
    from tercet.cli.export_triton import export  # noqa: PLC0415

    try:
        names = export(folder, target, backend=backend)
    except (StartupError, OSError) as error:
        raise Refusal(str(error)) from None
    click.echo(f"{target}: {', '.join(names)}; try: tritonserver --model-repository={target}")


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--key", type=FILE, required=True, help="PEM file with the private ed25519 key.")
def sign(folders: tuple[Path, ...], key: Path) -> None:
    """Sign models for `serve --require-signed`.

    \b
    Examples:
      tercet sign models/mnist models/fizzbuzz --key private.pem
    """  # noqa: D301
    try:
        from tercet.server.signature import sign as sign_  # noqa: PLC0415

        for folder in folders:
            click.echo(sign_(folder, key))
    except ImportError as error:
        raise Refusal(f"signatures need cryptography: pip install 'tercet[serve]' ({error})") from None
    except StartupError as error:
        raise Refusal(str(error)) from None


@main.command()
@click.argument("model", default="fizzbuzz", shell_complete=complete_models)
@click.option("--rows", type=COUNT, default=1, show_default=True, help="Rows of a request.")
@click.option("--in-flight", type=COUNT, default=32, show_default=True, help="Requests in flight, over at most 4 connections.")
@click.option("--requests", type=COUNT, default=6000, show_default=True, help="Requests a round.")
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Rounds that count; the figures are their medians.")
@FOLDER
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Processes of the service.")
def bench(model: str, rows: int, in_flight: int, requests: int, rounds: int, folder: Path, workers: int) -> None:
    """Measure the service beside its floors.

    These are a bare gRPC server and the bare engine. Prints a table, and how latencies are spread.

    \b
    Examples:
      tercet bench
      tercet bench fizzbuzz --rows 64
      tercet bench mnist --in-flight 1
    """  # noqa: D301
    try:
        from benchmarks import load as bench_  # noqa: PLC0415
        from tercet.card import read_card  # noqa: PLC0415
    except ImportError as error:
        raise Refusal(f"benchmarks need more packages: pip install 'tercet[serve,bench]' ({error})") from None
    try:
        card = read_card(folder / model)
    except StartupError as error:
        raise Refusal(str(error)) from None
    load = bench_.Load(
        request=bench_.build_request(card, rows), requests=requests, in_flight=in_flight, connections=min(4, in_flight)
    )
    serve_command = [sys.argv[0], "serve", "--port", "0", "--models", str(folder), "--workers", str(workers)]
    servers = {"tercet": serve_command, "echo": [sys.executable, "-P", "-m", "benchmarks.load"]}
    try:
        with click.progressbar(
            length=(1 + rounds) * len(servers), label=model, file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as bar:
            results = bench_.compare(servers, load, rounds, lambda: bar.update(1))
    except (RuntimeError, grpc.RpcError) as error:
        raise Refusal(error.details() if isinstance(error, grpc.Call) else str(error)) from None
    results["session.run"] = bench_.session_run(folder / model, card, rows)
    click.echo(bench_.table(results, rows))
    for name, found in results.items():
        click.echo(f"\n{name}, ms: {bench_.quantiles(found.latencies_ms)}\n{terminal.histogram(found.latencies_ms)}")


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes in a shell.

    It completes commands, options, names of models and files.

    \b
    Examples:
      eval "$(tercet completion bash)"       # in ~/.bashrc
      eval "$(tercet completion zsh)"        # in ~/.zshrc
      tercet completion fish | source        # in ~/.config/fish/config.fish
    """  # noqa: D301
    kind = get_completion_class(shell)
    assert kind  # noqa: S101  for the type checker: click has all three
    click.echo(kind(main, {}, "tercet", "_TERCET_COMPLETE").source(), nl=False)


@main.command()
@calls
@click.option("--host", default="127.0.0.1", show_default=True, help="Of the page.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="Of the page; 0 takes a free one.")
@FOLDER
def demo(client: Client, host: str, port: int, folder: Path) -> None:  # noqa: ARG001  the page opens a client for each question
    """Play with the models on a web page, until SIGTERM or Ctrl-C.

    Without --server, the page has a service of its own, which serves --models.

    \b
    Examples:
      tercet demo
      tercet demo --server localhost:8001
    """  # noqa: D301
    try:
        from tercet.web import page as demo_  # noqa: PLC0415
    except ImportError as error:
        raise Refusal(f"the page needs more packages: pip install 'tercet[serve,demo]' ({error})") from None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    context = click.get_current_context()
    own = context.get_parameter_source("server") == ParameterSource.DEFAULT
    options = {name: context.params[name] for name in ("token", "tls_ca", "tls_certificate", "tls_key")}
    try:
        with demo_.service(folder) if own else nullcontext(context.params["server"]) as address:
            demo_.run(demo_.Page(address, partial(Client, address, timeout=10, **options)), host, port)
    except StartupError as error:
        raise Refusal(str(error)) from None
