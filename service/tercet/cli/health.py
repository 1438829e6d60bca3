"""`tercet health`, or `python -m tercet.cli.health` where the command is not on the PATH."""

import sys
from functools import partial

import click

import tercet  # noqa: TC001  lazy
from tercet.cli.options import DEFAULT_SERVER, client_options, require


@click.command()
@click.argument("server", metavar="[HOST:PORT]", default=DEFAULT_SERVER, envvar="TERCET_SERVER")
@click.argument("name", default="")
@partial(client_options, timeout=4.0)
def health(client: "tercet.Client", name: str) -> None:
    """Health probe for containers and init systems.

    Prints the status of the service at HOST:PORT, or only of NAME: a model, or `workers`. Exits with 0 when it is SERVING, else 1.

    \b
    Examples:
      tercet health
      tercet health 127.0.0.1:8001 mnist
    """  # noqa: D301
    import grpc  # noqa: PLC0415  --help does without

    try:
        with require("serve"):
            status = client.health(name)
    except grpc.RpcError as error:
        status = f"{error.code().name}: {error.details()}"
    click.echo(status)
    sys.exit(int(status != "SERVING"))


if __name__ == "__main__":
    health()
