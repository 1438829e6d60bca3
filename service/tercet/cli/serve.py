"""`tercet serve`."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, get_args

import click

from tercet.cli.options import DEFAULT_SERVER, option, require
from tercet.errors import StartupError
from tercet.server.config import Config

EXAMPLES = {
    "mnist": "predict mnist examples/seven.png --draw",
    "diabetes": "predict diabetes glucose=148 bmi=33.6 age=50",
    "fizzbuzz": "fizzbuzz 1 30",
}


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of Config."""
    for field in reversed(dataclasses.fields(Config)):
        kind = next((part for part in get_args(field.type) if part is not type(None)), field.type)
        command = option(
            f"--{field.name.replace('_', '-')}",
            type=click.Choice(field.metadata["choices"]) if field.metadata["choices"] else kind,
            is_flag=kind is bool,
            default=field.default,
            envvar=f"TERCET_{field.name.upper()}",
            help=field.metadata["help"],
        )(command)
    return command


@click.command()
@config_options
def serve(**options: Any) -> None:
    """Serve the trained models until SIGTERM or Ctrl-C.

    \b
    Examples:
      tercet serve
      tercet serve --engine torch --device cuda
      tercet serve --workers 2 --port 0 --metrics-port 0
    """  # noqa: D301
    try:
        config = Config(**options)
    except StartupError as error:
        raise click.UsageError(str(error)) from None
    with require("serve"):
        import uvloop  # noqa: PLC0415

        from tercet.server import app, workers  # noqa: PLC0415
        from tercet.server.telemetry import configure_logging  # noqa: PLC0415
    configure_logging(config.log_format)
    uvloop.run((app if config.workers == 1 else workers).serve(config, announce))


def announce(config: Config, engines: Mapping[str, str]) -> None:
    """Print what is served where, once calls are accepted, and commands to try. Scripts read the address from the first line."""
    click.echo(f"tercet {version('tercet')} serves {', '.join(engines)} at {config.address}")
    if config.metrics_port is not None:
        click.echo(f"metrics at http://{config.host}:{config.metrics_port}/metrics")
    for name, engine in engines.items():
        click.echo(f"  {name:{max(map(len, engines))}}  {engine}")
    if config.workers > 1:
        click.echo(f"each in {config.workers} processes")
    address = f"HOST:{config.port}" if config.tls_key else config.address  # certificates are issued for host names
    variables = {
        f"SERVER={address}": address != DEFAULT_SERVER,
        "TLS_CA=CA.pem": config.tls_key,
        "CLIENT_CERTIFICATE=CLIENT.pem": config.tls_client_ca,
        "CLIENT_KEY=CLIENT.key": config.tls_client_ca,
        "TOKEN=TOKEN": config.token_file,
    }
    exports = [f"export TERCET_{variable}" for variable, needed in variables.items() if needed]
    examples = [f"tercet {example}" for name, example in EXAMPLES.items() if name in engines] or ["tercet models"]
    click.echo("\n  ".join(["try:", *exports, *examples]))
