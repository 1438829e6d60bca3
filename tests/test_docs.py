"""The examples in docs/ are true: each `console` block that begins with a prompt is run, and prints what the page shows.

`...` stands for anything. Figures with a decimal point, versions, free ports, and bars before a figure are not compared.
"""

import doctest
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import BIN, REPOSITORY, Service, run

PAGES = {
    path.name: blocks
    for path in (REPOSITORY / "docs").glob("*.md")
    if (blocks := re.findall(r"^```console\n(\$ .*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE))
}
FIGURE = re.compile(r"[█▏▎▍▌▋▊▉ ]*\d+(\.\d+)+%?|(?<=127\.0\.0\.1:)\d{5}")


def examples(blocks: list[str]) -> list[tuple[str, str]]:
    """Commands, which stand after `$ `, and what follows each."""
    found = [part.partition("\n") for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, printed) for command, _, printed in found]


def output(command: str, lines: int, folder: Path, address: str) -> str:
    """What a command prints; of a service, which does not end, the first lines."""
    if not command.startswith("trefoil serve"):
        return run("sh", "-c", command, cwd=folder, check=False, TREFOIL_SERVER=address, COLUMNS="80").stdout
    with subprocess.Popen([BIN / "trefoil", *command.split()[1:]], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        printed = "".join(process.stdout.readline() for _ in range(lines))
        process.terminate()
    return printed


@pytest.mark.parametrize("page", PAGES)
def test_examples_print_what_the_page_shows(workspace: Path, default_service: Service, page: str) -> None:
    """Each command of a page, run in a trained clone beside a running service, prints what stands below it."""
    for command, shown in examples(PAGES[page]):
        printed = output(command, shown.count("\n"), workspace, default_service.address)
        expected, found = (FIGURE.sub(" #", text) for text in (shown, printed))
        same = doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS)
        assert same, f"$ {command}\n{printed}\n--- docs/{page} shows\n{shown}"
