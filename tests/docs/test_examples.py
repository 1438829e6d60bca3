"""The examples run from top to bottom against a service, and print what they say they do."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Service, run

FIZZBUZZ = " ".join("fizz" * (number % 3 == 0) + "buzz" * (number % 5 == 0) or str(number) for number in range(1, 31))
PRINTED = {
    "pictures": [
        "seven.png shows a 7",
        "its bytes show a 7",
        "drawn: 0",
        "10000 strokes, read as [1]",
        "7 7 7",
        "expected (28, 28) uint8",
    ],
    "patients": [
        "Bea   7 of 8 measured: ",
        "Elsa  1 of 8 measured: ",
        "180 mg/dl ####",
        "unknown measurement 'glucose'",
        "patients[5].age_years",
    ],
    "counting": ["1 2 fizz 4 buzz fizzbuzz", "1024                 by fizzbuzz_any", FIZZBUZZ, "fizz (5 ahead) 16 (4 ahead)"],
    "any_model": [
        "number number fizz number buzz",
        "6000 pictures of noise",
        "1000 made-up patients",
        "expected INT64 of shape [-1], got",
        "expected INT64, got 1.5",
    ],
    "many_requests": [
        "'number': 533, 'fizz': 267, 'buzz': 134, 'fizzbuzz': 66",
        "fizzbuzz positive 3",
        FIZZBUZZ[:50],
        "then: DEADLINE_EXCEEDED",
    ],
}


def test_every_example_is_run() -> None:
    """Each script of the folder is run by a test: the demonstration by `make demo` and the test of a clone, the others here."""
    assert {path.stem for path in (REPOSITORY / "examples").glob("*.py")} == {"demo", *PRINTED}


@pytest.mark.parametrize("name", PRINTED)
def test_python(default_service: Service, name: str) -> None:
    """An example needs the address alone, and prints its answers."""
    example = (sys.executable, "-W", "error", f"examples/{name}.py", default_service.address)
    printed = run(*example, cwd=REPOSITORY).stdout
    for expected in PRINTED[name]:
        assert expected in printed


def test_typescript(default_service: Service, tmp_path: Path) -> None:
    """The client in TypeScript is generated from the .proto files, compiles in strict mode, and is answered by all services."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    shutil.copytree(REPOSITORY / "proto", tmp_path / "proto")
    shutil.copytree(
        REPOSITORY / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("node_modules", "generated", "build")
    )
    folder = tmp_path / "examples" / "typescript"
    installed = run("npm", "install", "--no-audit", "--no-fund", cwd=folder, check=False)
    if installed.returncode and (unreachable := re.search("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT", installed.stdout)):
        pytest.skip(f"npm reaches no registry: {unreachable[0]}")
    assert installed.returncode == 0, installed.stdout
    printed = run("npm", "start", "--", default_service.address, cwd=folder).stdout
    assert "seven.png shows a 7" in printed
    assert "patient: positive" in printed
    assert "fizz (fizzbuzz) 1024 (fizzbuzz_any) buzz (fizzbuzz_any)" in printed
