"""`tercet bench`: the command of a checkout; tests/benchmarks/test_load.py tests what it measures."""

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run


def test_outside_of_a_checkout(tmp_path: Path) -> None:
    """Without benchmarks/load.py the command says where to run it."""
    done = run("tercet", "bench", "--help", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "run `tercet bench` in a checkout" in done.stdout


@pytest.mark.parametrize("arguments", [["--nope"], ["--rows", "0"], ["fizzbuzz", "mnist"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str]) -> None:
    """The options are those of benchmarks/load.py."""
    done = run("tercet", "bench", *arguments, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert "Try `tercet bench --help`" in done.stdout or "Did you mean" in done.stdout
