"""`tercet bench`, with either driver."""

import re
import shutil
from pathlib import Path

import pytest
from tercet.server.config import Config

from tests.conftest import BIN, run

COMMAND = (str(BIN / "tercet"), "bench")


@pytest.mark.parametrize("driver", ["asyncio", "h2load"])
def test_bench(workspace: Path, tmp_path: Path, driver: str) -> None:
    """Each driver measures the service and both floors; every figure is a positive number, where it is not too small to print.

    Below the table every request of the rounds is in a histogram.
    """
    if driver == "h2load":
        if not (real := shutil.which("h2load")):
            pytest.skip("h2load is not installed")
        (tmp_path / "h2load").write_text(f'#!/bin/sh\necho used >> "{tmp_path}/used"\nexec {real} "$@"\n')
        (tmp_path / "h2load").chmod(0o755)
    flags = ("fizzbuzz", "--requests", "400", "--rounds", "1", "--models", str(workspace / "models"))
    done = run(*COMMAND, *flags, cwd=tmp_path, PATH=f"{BIN}:{tmp_path}")
    table, spread, *_ = done.stdout.split("\n\n")
    head, *lines = table.splitlines()
    assert head.split() == ["requests/s", "rows/s", "p50", "ms", "p99", "ms", "CPU", "us/request"]
    assert [line.split()[0] for line in lines] == ["tercet", "echo", "session.run"]
    for line in lines:
        figures = [float(figure) for figure in line.split()[1:]]
        assert len(figures) == 5
        rate, rows, p50, p99, cpu = figures
        assert min(rate, rows, p99, cpu) > 0
        assert 0 <= p50 <= p99  # printed in hundredths of a millisecond
    assert re.match(r"tercet, ms: p50 \S+, p90 \S+, p99 \S+, max \S+\n", spread)
    assert sum(int(line.split()[-1]) for line in spread.splitlines()[1:]) == 400
    assert (tmp_path / "used").exists() == (driver == "h2load")


def test_unknown_model(workspace: Path) -> None:
    """An unknown model is an error that suggests the right name."""
    done = run(*COMMAND, "minst", "--models", str(workspace / "models"), cwd=workspace, check=False)
    assert (done.returncode, done.stdout) == (1, "tercet: No model 'minst'. Did you mean 'mnist'?\n")


def test_a_load_that_is_refused(workspace: Path) -> None:
    """A load that the service refuses ends in the service's own sentence."""
    flags = ("fizzbuzz", "--rows", "5000", "--models", str(workspace / "models"))
    done = run(*COMMAND, *flags, cwd=workspace, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"tercet: inputs[0]: 5000 rows; a request has 1 to {Config().max_request_rows}"]
