"""README.md fits on a few screens, and what it says of the repository is true."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Service, run
from tests.docs.pages import tokens

README = (REPOSITORY / "README.md").read_text()
TREE = [token.content for token in tokens("README.md") if token.type == "fence"][-1]


def tree() -> set[Path]:
    """The paths in the tree of the README: entries at the left margin, and those indented below one of them."""
    paths, parent = set(), Path()
    for indent, name in re.findall(r"^( *)(\S+)", TREE, flags=re.MULTILINE):
        parent = parent if indent else Path(name)
        paths.add(parent / name if indent else parent)
    return paths


def rooms() -> set[Path]:
    """The top-level folders that git knows, with the package in place of its source root, and the package's folders."""
    files = [Path(name) for name in run("git", "ls-files", cwd=REPOSITORY).stdout.splitlines()]
    top = {Path(file.parts[0]) for file in files if len(file.parts) > 1 and not file.parts[0].startswith(".")}
    inside = {Path(*file.parts[:3]) for file in files if len(file.parts) > 3 and file.is_relative_to("service/tercet")}
    return top - {Path("service")} | {Path("service/tercet")} | inside


def test_the_readme_is_short() -> None:
    """At most 130 lines of at most 120 characters."""
    lines = README.splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 120] == []


def test_the_tree_shows_every_room() -> None:
    """The tree at the end of the README has one line for each folder, and no other."""
    assert tree() == rooms()


def test_the_make_targets_exist() -> None:
    """The make commands of the README name targets of the Makefile."""
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", README)) <= targets


@pytest.mark.slow
def test_predictions_are_right(default_service: Service) -> None:
    """The example picture is read as the seven that it shows, and fizzbuzz counts as it should."""
    seven = run("tercet", "predict", "mnist", "examples/seven.png", cwd=REPOSITORY, TERCET_SERVER=default_service.address)
    assert seven.stdout.startswith("examples/seven.png: 7 ")
    count = run("tercet", "fizzbuzz", "1", "6", cwd=REPOSITORY, TERCET_SERVER=default_service.address)
    assert count.stdout.split() == ["1", "2", "fizz", "4", "buzz", "fizz"]
