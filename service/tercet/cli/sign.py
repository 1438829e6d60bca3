"""`tercet sign`."""

from pathlib import Path

import click

from tercet.cli.options import FILE, require


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--key", type=FILE, required=True, help="PEM file with the private ed25519 key.")
def sign(folders: tuple[Path, ...], key: Path) -> None:
    """Sign models for `serve --require-signed`.

    \b
    Examples:
      tercet sign models/mnist models/fizzbuzz --key private.pem
    """  # noqa: D301
    with require("serve"):
        from tercet.server.security import sign_model  # noqa: PLC0415

    for folder in folders:
        click.echo(sign_model(folder, key))
