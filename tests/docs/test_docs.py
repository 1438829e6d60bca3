"""The examples in docs/ are true: each `console` block that begins with a prompt is run, and prints what the page shows.

`...` stands for anything. Figures with a decimal point, versions, ports, and bars before a figure are not compared. A service that
a block starts runs until the block ends, on free ports, which take the place of the page's in the rest of the block.
"""

import doctest
import re
import shlex
import shutil
import subprocess
from contextlib import ExitStack
from functools import reduce
from pathlib import Path

import pytest

from tests.conftest import BIN, REPOSITORY, Service, run

BLOCKS = {
    f"{path.name}-{number}": block
    for path in sorted((REPOSITORY / "docs").glob("*.md"))
    for number, block in enumerate(re.findall(r"^```console\n(\$ .*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE))
}
FIGURE = re.compile(r"[█▏▎▍▌▋▊▉ ]*\d+(\.\d+)+%?|(?<=:)\d{4,5}\b")
PROGRAMS = "curl", "openssl"  # not everywhere
PORT = re.compile(r"(?<=:)\d{4,5}\b|(?<=-port )\d+")


def examples(block: str) -> list[tuple[str, str]]:
    """Commands, which stand after `$ `, and what follows each."""
    parts = [part.partition("\n") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, printed) for command, _, printed in parts]


@pytest.fixture(scope="module")
def folder(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the trained workspace, for commands that change it."""
    return Path(shutil.copytree(workspace, tmp_path_factory.mktemp("docs") / "tercet"))


def start(command: str, lines: int, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A service on free ports, and the first lines that it prints."""
    words = shlex.split(PORT.sub("0", command))[1:]
    process = subprocess.Popen([BIN / "tercet", *words, "--port", "0"], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, "".join(process.stdout.readline() for _ in range(lines))


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_print_what_the_page_shows(folder: Path, default_service: Service, block: str) -> None:
    """Each command of a block, run in a trained clone beside a running service, prints what stands below it."""
    for program in PROGRAMS:
        if program in BLOCKS[block] and not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    variables = {"TERCET_SERVER": default_service.address, "COLUMNS": "80"}
    ports: dict[str, str] = {}
    with ExitStack() as services:
        for command, shown in examples(BLOCKS[block]):
            if command.startswith("tercet serve"):
                process, printed = start(command, shown.count("\n"), folder)
                services.enter_context(process)
                services.callback(process.terminate)
                ports = dict(zip(PORT.findall(shown), PORT.findall(printed), strict=True))
            else:
                here = reduce(lambda text, port: text.replace(*port), ports.items(), command)
                printed = run("sh", "-c", here, cwd=folder, check=False, **variables).stdout
            expected, found = (FIGURE.sub(" #", text) for text in (shown, printed))
            same = doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS)
            assert same, f"$ {command}\n{printed}\n--- docs/{block} shows\n{shown}"
