"""`tercet models`."""

import json
from pathlib import Path

import click
import msgspec

from tercet.card import find_models, is_trained, read_card
from tercet.cli.options import complete_models, models_option, unknown_model
from tercet.cli.render import details, overview


@click.command()
@click.argument("name", required=False, shell_complete=complete_models)
@models_option
@click.option("--json", "as_json", is_flag=True, help="Print the cards as JSON, one per line, without their test rows.")
def models(name: str | None, folder: Path, *, as_json: bool) -> None:
    """List the models, or describe one.

    The description of a model has its purpose, a warning, units and ranges, metrics, and where it comes from.

    \b
    Examples:
      tercet models
      tercet models diabetes
      tercet models --json | jq .metrics
    """  # noqa: D301
    names = find_models(folder)
    if name and name not in names:
        raise unknown_model(name, names)
    cards = {each: read_card(folder / each) if name or is_trained(folder / each) else None for each in ([name] if name else names)}
    if as_json:
        for each, card in cards.items():
            fields = msgspec.to_builtins(card) if card else {"name": each}
            click.echo(json.dumps({key: value for key, value in fields.items() if key != "examples"}, ensure_ascii=False))
    elif name and (card := cards[name]):
        click.echo(details(card))
    else:
        click.echo(overview(cards))
