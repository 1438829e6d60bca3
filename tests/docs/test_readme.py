"""The README tells the truth: its commands run, its tree is the tree."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Service, run

README = (REPOSITORY / "README.md").read_text()
ELSEWHERE = (
    "make ",  # runs this test
    ". .venv/bin/activate",  # the tests run in an environment already
    "tercet serve",  # does not end; a fixture starts it
    "tercet demo",  # the same; tests/web/test_demo.py starts it
)


def blocks(language: str) -> list[str]:
    """The code blocks of a language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [body for name, body in fenced if name == language]


def commands() -> list[str]:
    """Every shell command of the README, but for those of ELSEWHERE."""
    lines = [line.partition(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the trained workspace, for commands that change it."""
    return Path(shutil.copytree(workspace, tmp_path_factory.mktemp("readme") / "tercet"))


def test_the_shell_commands_run(folder: Path, default_service: Service) -> None:
    """Each shell command of the README exits with 0 in a trained clone, beside a running service."""
    assert commands()
    for command in commands():
        run("sh", "-c", command, cwd=folder, TERCET_SERVER=default_service.address)


def test_the_python_snippets_run(folder: Path, default_service: Service) -> None:
    """Each Python snippet of the README runs as it stands, but for the address."""
    assert blocks("python")
    for snippet in blocks("python"):
        run(sys.executable, "-c", snippet.replace("127.0.0.1:8001", default_service.address), cwd=folder)


def test_predictions_are_right(default_service: Service) -> None:
    """The example picture is read as the seven that it shows, and fizzbuzz counts as it should."""
    seven = run("tercet", "predict", "mnist", "examples/seven.png", cwd=REPOSITORY, TERCET_SERVER=default_service.address)
    assert seven.stdout.startswith("examples/seven.png: 7 ")
    count = run("tercet", "fizzbuzz", "1", "6", cwd=REPOSITORY, TERCET_SERVER=default_service.address)
    assert count.stdout.split() == ["1", "2", "fizz", "4", "buzz", "fizz"]


def test_the_tree_is_the_tree() -> None:
    """Every file that the README's tree names exists, and every module of the source is in it."""
    tree = blocks("")[0]
    folder, named = Path(), set()
    for indent, name in re.findall(r"^( *)(\S+)", tree, flags=re.MULTILINE):
        if not indent:
            folder = Path(name)
        if indent and name.startswith("<name>"):
            continue
        path = folder / name if indent else Path(name)
        assert (REPOSITORY / path).exists(), path
        named.add(path)
    for package in ("models", "pipeline", "service", "proto"):
        modules = [path for path in (REPOSITORY / package).glob("*.py") if "_pb2" not in path.name and path.name != "__init__.py"]
        assert {path.relative_to(REPOSITORY) for path in modules} <= named


def test_the_make_targets_exist() -> None:
    """The README's make commands name targets of the Makefile."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
