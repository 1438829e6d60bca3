"""Fixtures of the server's tests."""

import shutil
from pathlib import Path

import pytest
from tercet.card import Card, read_card

import models
from tests.server.support import HeldEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> HeldEngine:
    """The engine of every model of a server that is started in this process."""
    held = HeldEngine()
    monkeypatch.setattr("tercet.server.repository.load_engine", lambda *_: held)
    return held


@pytest.fixture
def cards(workspace: Path) -> dict[str, Card]:
    """The cards of the trained models, by name."""
    return {name: read_card(workspace / "models" / name) for name in models.names()}


@pytest.fixture(scope="session")
def small(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fizzbuzz alone: it starts quickly."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(workspace / "models" / "fizzbuzz", folder / "fizzbuzz")
    return folder
