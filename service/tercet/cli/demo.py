"""`tercet demo`."""

import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

import tercet  # noqa: TC001  lazy
from tercet.cli.options import client_options, models_option, require, server_option


@click.command()
@server_option
@client_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the web page listens on.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="Its port; 0 picks a free one.")
@models_option
def demo(client: "tercet.Client", host: str, port: int, folder: Path) -> None:
    """Try the models on a web page.

    It runs until SIGTERM or Ctrl-C. Without --server it starts a service of its own for --models.

    \b
    Examples:
      tercet demo
      tercet demo --server localhost:8001
    """  # noqa: D301
    with require("serve,demo"):
        from tercet.web import page  # noqa: PLC0415
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    context = click.get_current_context()
    own_service = context.get_parameter_source("server") == ParameterSource.DEFAULT
    options = {name: context.params[name] for name in ("token", "tls_ca", "tls_certificate", "tls_key")}
    with page.service(folder) if own_service else nullcontext(context.params["server"]) as address:
        page.run(page.Page(address, partial(type(client), address, timeout=10, **options)), host, port)
