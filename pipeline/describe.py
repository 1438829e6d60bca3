"""Render a model's card as a page: card.json -> docs/models/<model>.md."""

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline.stage import folder, main

PAGES = Path("docs", "models")


def short(value: Any) -> str:
    """A figure with four digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page(card: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The page of a model, in Markdown, from its card.json and metrics.json."""
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
    """Stage: card.json and metrics.json -> docs/models/<model>.md."""
    card, metrics = (json.loads((folder(model) / name).read_text()) for name in ("card.json", "metrics.json"))
    PAGES.mkdir(parents=True, exist_ok=True)
    (PAGES / f"{model}.md").write_text(page(card, metrics))


if __name__ == "__main__":
    main(describe)
