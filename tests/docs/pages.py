"""Runs the code blocks of a Markdown page, in order, in a trained clone next to a running service.

| block | what happens |
|---|---|
| `console`, with `$ ` prompts | each command must print what follows it; its exit code is not checked |
| `console`, without prompts | not run: it needs programs or hosts that the tests do not have |
| `sh` | each line must exit with 0 |
| `python` | executed; the blocks of a page share one namespace |
| `python` or `yaml`, first line `# PATH` | appended to that file of the clone, which is created if needed |

`...` in the output of a `console` block matches anything. Numbers with a decimal point, versions, ports, and bars before a number
are not compared. A server that a block starts uses free ports, which replace those of the page, and runs until the block ends.
`<!-- skip: next -->` before a block skips it.
"""

import doctest
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from tests.conftest import BIN, REPOSITORY, run

ADDRESS = re.compile(r"\b(?:127|10)\.0\.0\.\d:8001\b")  # the running service's, as the pages write it
FILE = re.compile(r"# (\S+\.\w+)\n")
FIGURE = re.compile(r"[█▏▎▍▌▋▊▉━╸╺ ]*\d+(\.\d+)+%?|(?<=:)\d{4,5}\b")
NOT_RUN = (
    *("make ", ". .venv/", "git clone ", "pip install "),  # they set up the environment in which the tests run
    *('eval "$(_TERCET_COMPLETE=', "_TERCET_COMPLETE="),  # for an interactive bash, zsh or fish
)
OPTIONAL_PROGRAMS = ("curl", "hadolint", "openssl")
PORT = re.compile(r"(?<=:)\d{4,5}\b|(?<=-port )\d+")
SERVERS = ("tercet serve", "tercet demo")


class Page:
    """The code blocks of one page, as sybil finds them.

    `folder` is a clone that the blocks may change, `address` that of a service on its models.
    """

    def __init__(self, path: Path, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.printed: list[str] = []
        evaluators = {"console": self.console, "sh": self.sh, "python": self.python, "yaml": self.append_to_file}
        parsers = [CodeBlockParser(language, evaluator) for language, evaluator in evaluators.items()]
        self.examples = list(Document.parse(str(path), SkipParser(), *parsers))

    def console(self, example: Example) -> str | None:
        """Run each command of a block with prompts and compare what it prints."""
        if not example.parsed.startswith("$ "):
            return None
        skip_unless_installed(example.parsed)
        ports: dict[str, str] = {}
        with ExitStack() as servers:
            for command, expected in commands(example.parsed):
                if command.startswith(SERVERS):
                    printed = servers.enter_context(server(command, expected.count("\n"), self.folder))
                    ports |= dict(zip(PORT.findall(expected), PORT.findall(printed), strict=True))
                else:
                    printed = self.shell(reduce(lambda text, port: text.replace(*port), ports.items(), command), check=False)
                if not same_output(expected, printed):
                    return f"$ {command}\n{printed}--- the page shows:\n{expected}"
        return None

    def sh(self, example: Example) -> None:
        """Run each line of a block."""
        skip_unless_installed(example.parsed)
        for line in example.parsed.splitlines():
            if not line.startswith(NOT_RUN):
                self.printed.append(self.shell(ADDRESS.sub(self.address, line), check=True))

    def python(self, example: Example) -> None:
        """Execute a block, or add it to the file that its first line names."""
        if FILE.match(example.parsed):
            self.append_to_file(example)
        else:
            example.parsed = type(example.parsed)(ADDRESS.sub(self.address, example.parsed), 0, example.parsed.line_offset)
            PythonEvaluator()(example)

    def append_to_file(self, example: Example) -> None:
        """Add a block to the file that its first line names."""
        if named := FILE.match(example.parsed):
            path = self.folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(example.parsed)

    def shell(self, command: str, *, check: bool) -> str:
        """What a command prints."""
        return run("sh", "-c", command, cwd=self.folder, check=check, TERCET_SERVER=self.address, COLUMNS="80").stdout


def tokens(page: str) -> list[Token]:
    """The Markdown tokens of a page of this repository, inline ones included."""
    blocks = MarkdownIt("commonmark").enable("table").parse((REPOSITORY / page).read_text())
    return [token for block in blocks for token in (block, *(block.children or []))]


@contextmanager
def server(command: str, lines: int, folder: Path) -> Iterator[str]:
    """Start a server on free ports, return the first `lines` that it prints, and stop it."""
    words = [str(BIN / "tercet"), *shlex.split(PORT.sub("0", command))[1:], "--port", "0"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield "".join(process.stdout.readline() for _ in range(lines))
        finally:
            process.terminate()


def commands(block: str) -> list[tuple[str, str]]:
    """Each command of a `console` block, and the output that follows it."""
    parts = [part.partition("\n") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, output) for command, _, output in parts]


def same_output(expected: str, printed: str) -> bool:
    """Whether the outputs are equal apart from what is not compared."""
    return doctest.OutputChecker().check_output(FIGURE.sub(" #", expected), FIGURE.sub(" #", printed), doctest.ELLIPSIS)


def skip_unless_installed(block: str) -> None:
    """Skip a block that uses a program which this machine lacks."""
    for program in OPTIONAL_PROGRAMS:
        if re.search(rf"\b{program}\b", block) and not shutil.which(program, path=f"{BIN}:/usr/bin:/bin"):
            pytest.skip(f"{program} is not installed")
