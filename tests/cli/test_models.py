"""`tercet models`: the table and the cards."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import run

pytestmark = pytest.mark.slow


def test_models_lists_what_is_trained(workspace: Path, tmp_path: Path) -> None:
    """The list is an aligned table of at most 80 columns that shows which models are not trained; `--json` prints the cards."""
    for card in (workspace / "models").glob("*/card.json"):
        (copy := tmp_path / "models" / card.parent.name).mkdir(parents=True)
        shutil.copy(card, copy)
    (tmp_path / "models" / "untrained").mkdir()
    (tmp_path / "models" / "untrained" / "contract.py").touch()
    head, *lines = run("tercet", "models", cwd=tmp_path).stdout.splitlines()
    cards = [json.loads(line) for line in run("tercet", "models", "--json", cwd=tmp_path).stdout.splitlines()]
    start = head.index("LABELS")
    labels = {line.split()[0]: line[start : head.index("METRIC")].strip() for line in lines}
    assert labels["diabetes"] == "negative, positive"
    assert labels["mnist"] == "0 .. 9"
    assert "not trained" in next(line for line in lines if line.startswith("untrained"))
    assert max(map(len, lines)) <= 80
    assert {card["name"]: card.get("labels") for card in cards}["untrained"] is None
    assert next(card for card in cards if card["name"] == "diabetes")["input"]["features"][5]["unit"] == "kg/m²"


def test_a_model_is_described(workspace: Path) -> None:
    """The description has units and ranges, and wraps at the width of the terminal without colours."""
    text = run("tercet", "models", "diabetes", cwd=workspace, COLUMNS="60", FORCE_COLOR="1").stdout
    assert "  bmi_kg_per_m2         0 to 150   kg/m²\n" in text
    assert max(map(len, text.splitlines())) <= 60
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["minst"], "No model 'minst'. Did you mean 'mnist'?"),
        (["tulips"], "No model 'tulips'. Expected one of: diabetes, fizzbuzz, fizzbuzz_any, mnist."),
        (["--models", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_unknown_models(workspace: Path, arguments: list[str], message: str) -> None:
    """A wrong name or folder is one line that says what would be right."""
    done = run("tercet", "models", *arguments, cwd=workspace, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith(f"tercet: {message}")
