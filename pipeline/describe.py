"""Render a model's card and metrics as a page of the documentation, docs/models/<model>.md."""

import json
from pathlib import Path

import jinja2
import yaml

from models.files import atomic_write
from pipeline.common import Paths

TEMPLATE = Path(__file__).with_suffix(".md.j2")


def describe(model: str) -> None:
    """Stage: card.json, report/metrics.json -> docs/models/<model>.md."""
    card = json.loads((Paths(model).trained / "card.json").read_text())
    metrics = json.loads((Paths(model).report / "metrics.json").read_text())
    template = jinja2.Template(
        TEMPLATE.read_text(), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    page = template.render(card=card, metrics=metrics, params=yaml.safe_dump(card["params"], sort_keys=False).rstrip())
    atomic_write(Path("docs", "models", f"{model}.md"), page.encode())
