"""The commands of all pages run and print what the page shows, links resolve, and the index is complete."""

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tercet.card import read_card
from tercet.client import Client

from pipeline.evaluate import TOLERANCE
from tests.conftest import REPOSITORY, Service, run, serving
from tests.docs.pages import Page, tokens

ADD_A_MODEL = "docs/add-a-model.md"  # has a test of its own
RUN = re.compile(r"^```(sh|python|console\n\$)", re.MULTILINE)
PAGES = sorted(run("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", cwd=REPOSITORY).stdout.split())


def links(page: str) -> Iterator[str]:
    """The relative links of a page, pictures included."""
    for token in tokens(page):
        targets = [token.attrs.get("href"), token.attrs.get("src")]
        if token.type.startswith("html"):
            targets += re.findall(r'(?:href|src)="([^"]+)"', token.content)
        yield from (str(target) for target in targets if target and "://" not in str(target))


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = [text.content for tag, text in pairwise(tokens(page)) if tag.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    """Every relative link of a page names an existing file and, with an anchor, one of its headings."""
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(str(target.resolve().relative_to(REPOSITORY))), link


def test_the_index_lists_every_page() -> None:
    """docs/README.md links to every other page of docs/."""
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages - {"README.md"} <= set(links("docs/README.md"))


@pytest.fixture
def folder(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained workspace, as the current folder."""
    copy = shutil.copytree(workspace, tmp_path / "tercet")
    monkeypatch.chdir(copy)
    return copy


def run_blocks(page: Page, subtests: pytest.Subtests) -> None:
    """Run the blocks of a page, and report each failure by its line."""
    for example in page.examples:
        with subtests.test(f"line {example.line}"):
            example.evaluate()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [page for page in PAGES if page != ADD_A_MODEL and RUN.search((REPOSITORY / page).read_text())])
def test_code_blocks(folder: Path, default_service: Service, subtests: pytest.Subtests, name: str) -> None:
    """Every code block of a page does what pages.py says of its kind."""
    run_blocks(Page(REPOSITORY / name, folder, default_service.address), subtests)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_added_model_is_trained_and_served(folder: Path, default_service: Service, subtests: pytest.Subtests) -> None:
    """docs/add-a-model.md: all ways to train end below 0.001, only the new model is trained, and both engines reproduce its card.

    Serving needs model.onnx and card.json only.
    """
    page = Page(REPOSITORY / ADD_A_MODEL, folder, default_service.address)
    run_blocks(page, subtests)
    namespace = page.examples[0].namespace
    assert max(namespace["by_hand"], namespace["by_autograd"], namespace["by_optimizer"]) < 0.001
    stages = re.findall(r"^Running stage '(.+)'", "".join(page.printed), flags=re.MULTILINE)
    assert stages == [f"{stage}@lesson" for stage in ("prepare", "train", "export", "evaluate", "describe")]

    home = folder / "models" / "lesson"
    copied = folder / "served" / "lesson"
    copied.mkdir(parents=True)
    for file in ("model.onnx", "card.json"):
        shutil.copyfile(home / file, copied / file)
    card = read_card(home)
    expected = [example.output for example in card.examples]
    for models, engine in ((copied.parent, "onnxruntime"), (home.parent, "torch")):
        with serving(models, engine=engine) as service, Client(service.address) as client:
            answers = client.infer("lesson", card.example_rows())
        np.testing.assert_allclose(answers, expected, rtol=TOLERANCE, atol=TOLERANCE)
