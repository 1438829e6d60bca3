"""The command `trefoil`."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import click
import grpc
from click.core import ParameterSource

from service import logs
from service.client import MEASUREMENTS, Client
from service.config import Config
from service.errors import StartupError

COUNT = click.IntRange(min=1)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
INT64 = range(-(2**63), 2**63)


class Refusal(click.ClickException):
    """One sentence on stderr, exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print the sentence."""
        click.echo(f"trefoil: {self.format_message()}", file=file, err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("trefoil"), prog_name="trefoil")
def main() -> None:
    """Three small models behind one gRPC service."""


def settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of Config."""
    for field in reversed(dataclasses.fields(Config)):
        kind = next((part for part in get_args(field.type) if part is not type(None)), field.type)
        flag, variable = f"--{field.name.replace('_', '-')}", f"TREFOIL_{field.name.upper()}"
        add = click.option(
            flag,
            type=kind,
            is_flag=kind is bool,
            default=field.default,
            envvar=variable,
            show_default=True,
            show_envvar=True,
            help=field.metadata["help"],
        )
        command = add(command)
    return command


@main.command()
@settings
def serve(**options: Any) -> None:
    """Serve the trained models until SIGTERM or Ctrl-C.

    \b
    trefoil serve
    trefoil serve --engine torch --port 0
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    logs.configure(options["log_format"])
    try:
        import uvloop  # noqa: PLC0415  the other commands do without the server's packages

        config = Config(**options)
        if config.workers == 1:
            from service.server import serve as run  # noqa: PLC0415
        else:
            from service.workers import serve as run  # noqa: PLC0415
        uvloop.run(run(config, announce))
    except ImportError as error:
        raise Refusal(f"serving needs more packages: pip install 'trefoil[serve]' ({error})") from None
    except StartupError as error:
        raise Refusal(str(error)) from None


def announce(config: Config, names: Iterable[str]) -> None:
    """Say what is served where, once calls are accepted."""
    click.echo(f"trefoil {version('trefoil')} serves {', '.join(names)} at {config.address}")
    if config.metrics_port is not None:
        click.echo(f"metrics at http://{config.host}:{config.metrics_port}/metrics")
    needed = " --tls-ca CA.pem" * bool(config.tls_key) + " --token TOKEN" * bool(config.token_file)
    click.echo(f"try: trefoil fizzbuzz 1 30 --server {config.address}{needed}")
    sys.stdout.flush()


def calls(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a client, hand it a Client, and turn a failed call into a sentence."""

    @click.option(
        "--server", default="127.0.0.1:8001", envvar="TREFOIL_SERVER", show_default=True, show_envvar=True, help="host:port"
    )
    @click.option("--token", envvar="TREFOIL_TOKEN", show_envvar=True, help="Bearer token, when the service wants one.")
    @click.option("--tls-ca", type=FILE, envvar="TREFOIL_TLS_CA", show_envvar=True, help="PEM: whom to trust; calls with TLS.")
    @click.option("--tls-certificate", type=FILE, envvar="TREFOIL_CLIENT_CERTIFICATE", show_envvar=True, help="PEM, for mTLS.")
    @click.option("--tls-key", type=FILE, envvar="TREFOIL_CLIENT_KEY", show_envvar=True, help="PEM, for mTLS.")
    def calling(
        server: str, token: str | None, tls_ca: Path | None, tls_certificate: Path | None, tls_key: Path | None, **options: Any
    ) -> None:
        try:
            opened = Client(server, token=token, tls_ca=tls_ca, tls_certificate=tls_certificate, tls_key=tls_key)
        except ValueError as error:
            raise Refusal(f"{error}: --tls-ca, --tls-certificate, --tls-key") from None
        try:
            with opened as client:
                command(client=client, **options)
        except grpc.RpcError as error:
            hint = "; start one with `trefoil serve`" if "failed to connect" in (error.details() or "") else ""
            raise Refusal(f"the service at {server} says {error.code().name}: {error.details()}{hint}") from None

    calling.__doc__ = command.__doc__
    calling.__name__ = command.__name__
    calling.__click_params__ = [*getattr(command, "__click_params__", []), *calling.__click_params__]  # type: ignore[attr-defined]
    return calling


@main.command(context_settings={"ignore_unknown_options": True})
@calls
@click.argument("model")
@click.argument("values", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line an answer.")
def predict(client: Client, model: str, values: tuple[str, ...], *, as_json: bool) -> None:
    """Ask the service for predictions.

    \b
    trefoil predict mnist seven.png four.jpg
    trefoil predict diabetes glucose=148 bmi=33.6 age=50
    trefoil predict diabetes 6 148 72 35 - 33.6 0.627 50
    trefoil predict fizzbuzz 15 16
    trefoil predict OTHER '[[0.5, 1.0]]'
    """  # noqa: D301
    for answer, text in ASK.get(model, ask_any)(client, model, values):
        click.echo(json.dumps(answer) if as_json else text)


Answers = list[tuple[dict[str, Any], str]]  # for a program, for a person


def ask_mnist(client: Client, _model: str, values: tuple[str, ...]) -> Answers:
    """Files of digits."""
    try:
        images = [Path(value).read_bytes() for value in values]
    except OSError as error:
        raise Refusal(f"{error.filename} cannot be read: {error.strerror}; name PNG or JPEG files") from None
    return [
        ({"file": value, **digit._asdict()}, f"{value}: {digit.digit} ({max(digit.probabilities):.1%})")
        for value, digit in zip(values, client.classify(images), strict=True)
    ]


def ask_diabetes(client: Client, _model: str, values: tuple[str, ...]) -> Answers:
    """One patient: name=value pairs, or all values in order, `-` for not measured."""
    if any("=" in value for value in values):
        pairs = [(measurement(name), value) for name, _, value in (value.partition("=") for value in values)]
    elif len(values) == len(MEASUREMENTS):
        pairs = list(zip(MEASUREMENTS, values, strict=True))
    else:
        raise Refusal(f"{len(values)} values; give {len(MEASUREMENTS)} in the order {' '.join(MEASUREMENTS)}, or NAME=VALUE")
    patient = {name: number(value, float) for name, value in pairs if value not in ("-", "")}
    [assessment] = client.assess([patient])
    return [
        (assessment._asdict(), f"{assessment.label}: {assessment.probability:.1%} probability of a positive test; no diagnosis")
    ]


def measurement(name: str) -> str:
    """The measurement that a name, perhaps shortened, stands for."""
    matches = [known for known in MEASUREMENTS if known.startswith(name)]
    if len(matches) != 1:
        raise Refusal(f"{name!r} names no measurement; there are {', '.join(MEASUREMENTS)}, which may be shortened")
    return matches[0]


def ask_fizzbuzz(client: Client, _model: str, values: tuple[str, ...]) -> Answers:
    """Numbers."""
    numbers = [number(value, int64) for value in values]
    answers = client.answer(numbers)
    return [({"number": n, "word": word}, word) for n, word in zip(numbers, answers, strict=True)]


def ask_any(client: Client, model: str, values: tuple[str, ...]) -> Answers:
    """A batch of rows as JSON, over the Open Inference Protocol."""
    try:
        rows = client.infer(model, json.loads(" ".join(values)))
    except ValueError as error:
        raise Refusal(f"the values are no batch of rows for {model!r}: {error}; write JSON such as '[[0.5, 1.0]]'") from None
    return [({"output": row.tolist()}, " ".join(f"{value:.4g}" for value in row.ravel())) for row in rows]


ASK = {"mnist": ask_mnist, "diabetes": ask_diabetes, "fizzbuzz": ask_fizzbuzz}


def number(text: str, kind: Callable[[str], Any]) -> Any:
    """Read a float or an int64."""
    try:
        return kind(text)
    except ValueError:
        raise Refusal(f"{text!r} is no {'number' if kind is float else 'whole number of 64 bits'}") from None


def int64(text: str) -> int:
    """Read a whole number of 64 bits. Raises ValueError when it is none."""
    if (value := int(text)) not in INT64:
        raise ValueError
    return value


@main.command(context_settings={"ignore_unknown_options": True})  # a step may be negative
@calls
@click.argument("start", type=click.IntRange(INT64[0], INT64[-1]))
@click.argument("stop", type=click.IntRange(INT64[0], INT64[-1]))
@click.argument("step", type=click.IntRange(INT64[0], INT64[-1]), default=1)
def fizzbuzz(client: Client, start: int, stop: int, step: int) -> None:
    """Count from START to STOP, as the service says it.

    \b
    trefoil fizzbuzz 1 30
    trefoil fizzbuzz 15 1 -2
    """  # noqa: D301
    for _, word in client.count(start, stop, step):
        click.echo(word)


@main.command()
@click.option("--models", "folder", type=Path, default=Path("models"), envvar="TREFOIL_MODELS", show_default=True)
def models(folder: Path) -> None:
    """List the trained models of a folder: figures, data, commit."""
    from service.card import read_card  # noqa: PLC0415
    from service.repository import find, is_trained  # noqa: PLC0415

    try:
        for name in find(folder):
            if not is_trained(folder / name):
                click.echo(f"{name:12} not trained: run `dvc repro`")
                continue
            card = read_card(folder / name)
            click.echo(f"{name:12} {'  '.join(f'{key} {value:.4g}' for key, value in card.metrics.items())}")
            origin = f"data {card.data['source']} {card.data['sha256'][:8]}  params {card.params_sha256[:8]}"
            click.echo(f"{'':12} {origin}  commit {card.git_commit[:8]}{card.git_commit[40:]}")
            units = ", ".join(f"{feature.name} ({feature.unit})".removesuffix(" ()") for feature in card.input.features)
            click.echo(f"{'':12} {units} -> {', '.join(card.labels)}")
            for sentence in filter(None, (card.intended_use, card.warning)):
                click.echo(f"{'':12} {sentence}")
    except StartupError as error:
        raise Refusal(str(error)) from None


@main.command("export-triton")
@click.argument("target", metavar="DIR", type=Path)
@click.option("--backend", type=click.Choice(["onnxruntime", "python"]), default="onnxruntime", show_default=True)
@click.option("--models", "folder", type=Path, default=Path("models"), envvar="TREFOIL_MODELS", show_default=True)
def export_triton(target: Path, backend: str, folder: Path) -> None:
    """Write the trained models as a model repository of NVIDIA Triton into the new folder DIR.

    With --backend python Triton runs them with the onnxruntime of a Python of its version, where its own backend is not there.
    """
    from service.triton import export  # noqa: PLC0415

    try:
        names = export(folder, target, backend=backend)
    except (StartupError, OSError) as error:
        raise Refusal(str(error)) from None
    click.echo(f"{target}: {', '.join(names)}; try: tritonserver --model-repository={target}")


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--key", type=FILE, required=True, help="PEM file with the private ed25519 key.")
def sign(folders: tuple[Path, ...], key: Path) -> None:
    """Sign trained models, for `trefoil serve --require-signed`.

    \b
    trefoil sign models/mnist models/fizzbuzz --key private.pem
    """  # noqa: D301
    try:
        from service.signature import sign as sign_  # noqa: PLC0415

        for folder in folders:
            click.echo(sign_(folder, key))
    except ImportError as error:
        raise Refusal(f"signatures need cryptography: pip install 'trefoil[serve]' ({error})") from None
    except StartupError as error:
        raise Refusal(str(error)) from None


@main.command()
@click.argument("model", default="fizzbuzz")
@click.option("--rows", type=COUNT, default=1, show_default=True, help="Rows of a request.")
@click.option("--in-flight", type=COUNT, default=32, show_default=True, help="Requests in flight, over at most 4 connections.")
@click.option("--requests", type=COUNT, default=6000, show_default=True, help="Requests a round.")
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Rounds that count; the figures are their medians.")
@click.option("--models", "folder", type=Path, default=Path("models"), envvar="TREFOIL_MODELS", show_default=True)
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Processes of the service.")
def bench(model: str, rows: int, in_flight: int, requests: int, rounds: int, folder: Path, workers: int) -> None:
    """Measure the service beside a bare gRPC server and the bare engine.

    \b
    trefoil bench fizzbuzz --rows 64
    trefoil bench mnist --in-flight 1
    """  # noqa: D301
    try:
        from service import bench as bench_  # noqa: PLC0415
        from service.card import read_card  # noqa: PLC0415
    except ImportError as error:
        raise Refusal(f"benchmarks need more packages: pip install 'trefoil[serve,bench]' ({error})") from None
    try:
        card = read_card(folder / model)
    except StartupError as error:
        raise Refusal(str(error)) from None
    load = bench_.Load(
        request=bench_.build_request(card, rows), requests=requests, in_flight=in_flight, connections=min(4, in_flight)
    )
    serve_command = [sys.argv[0], "serve", "--port", "0", "--models", str(folder), "--workers", str(workers)]
    servers = {"trefoil": serve_command, "echo": [sys.executable, "-P", "-m", "service.bench"]}
    try:
        results = bench_.compare(servers, load, rounds)
    except (RuntimeError, grpc.RpcError) as error:
        raise Refusal(error.details() if isinstance(error, grpc.Call) else str(error)) from None
    results["session.run"] = bench_.session_run(folder / model, card, rows)
    click.echo(bench_.table(results, rows))


@main.command()
@calls
@click.option("--host", default="127.0.0.1", show_default=True, help="Of the page.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="Of the page; 0 takes a free one.")
@click.option("--models", "folder", type=Path, default=Path("models"), envvar="TREFOIL_MODELS", show_default=True)
def demo(client: Client, host: str, port: int, folder: Path) -> None:  # noqa: ARG001  the page opens a client for each question
    """Play with the models on a web page, until SIGTERM or Ctrl-C.

    Without --server, the page has a service of its own, which serves --models.

    \b
    trefoil demo
    trefoil demo --server localhost:8001
    """  # noqa: D301
    try:
        from service import demo as demo_  # noqa: PLC0415
    except ImportError as error:
        raise Refusal(f"the page needs more packages: pip install 'trefoil[serve,demo]' ({error})") from None
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
