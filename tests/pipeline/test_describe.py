"""The page of a model shows its card."""

import json
from pathlib import Path

import pytest

import models

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", models.names())
def test_a_page_says_what_the_card_says(trained: Path, name: str) -> None:
    """The page of a model has its description, warning, every unit and range, every metric and the hashes of its files."""
    card = json.loads((trained / "models" / name / "card.json").read_text())
    text = (trained / "docs" / "models" / f"{name}.md").read_text()
    for sentence in (card["description"], card["warning"], card["intended_use"], card["data"]["sha256"], card["git_commit"]):
        assert sentence in text
    for feature in card["input"]["features"]:
        assert f"| `{feature['name']}` | {feature['unit'] or '-'} | {feature['minimum']} to {feature['maximum']} |" in text
    for metric in card["metrics"]:
        assert metric == "rows" or f"| {metric.replace('_', ' ')} | " in text
    for file, digest in card["files"].items():
        assert f"| {file} | SHA-256 `{digest}` |" in text
