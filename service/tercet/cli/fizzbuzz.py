"""`tercet fizzbuzz`."""

import click

import tercet  # noqa: TC001  lazy
from tercet.cli.options import client_options, server_option

INT64 = click.IntRange(-(2**63), 2**63 - 1)


@click.command(context_settings={"ignore_unknown_options": True})  # numbers may be negative
@server_option
@client_options
@click.argument("start", type=INT64)
@click.argument("stop", type=INT64)
@click.argument("step", type=INT64, default=1)
def fizzbuzz(client: "tercet.Client", start: int, stop: int, step: int) -> None:
    """Count from START to STOP, both included.

    \b
    Examples:
      tercet fizzbuzz 1 30
      tercet fizzbuzz 15 1 -2
    """  # noqa: D301
    for _, word in client.count(start, stop, step):
        click.echo(word)
