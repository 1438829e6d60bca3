"""A working folder with trained models."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def trained(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained workspace as the working folder; read-only."""
    monkeypatch.chdir(workspace)
    return workspace


@pytest.fixture
def scratch(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained workspace as the working folder."""
    copy = shutil.copytree(workspace, tmp_path / "scratch")
    monkeypatch.chdir(copy)
    return copy
