"""Render a model's card and metrics as a page of the documentation, docs/models/<model>.md."""

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml

from models.files import atomic_write
from pipeline.common import Paths, main

PAGES = Path("docs", "models")


def short(value: Any) -> str:
    """A float with four digits; anything else unchanged."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page(card: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The page of a model, in Markdown."""
    environment = jinja2.Environment(  # noqa: S701  Markdown, from our own cards
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"short": short, "yaml": lambda tree: yaml.safe_dump(tree, sort_keys=False).rstrip()}
    return environment.get_template("describe.md.j2").render(card=card, metrics=metrics)


def describe(model: str) -> None:
    """Stage: card.json, report/metrics.json -> docs/models/<model>.md."""
    card = json.loads((Paths(model).trained / "card.json").read_text())
    metrics = json.loads((Paths(model).report / "metrics.json").read_text())
    atomic_write(PAGES / f"{model}.md", page(card, metrics).encode())


if __name__ == "__main__":
    main(describe)
