"""benchmarks/load.py: its helpers, and `tercet bench` with either load generator."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tercet.card import Tensor
from tercet.proto.inference_pb2 import ModelInferResponse
from tercet.server.config import Config

from benchmarks import load
from tests.conftest import BIN, REPOSITORY, run

COMMAND = (str(BIN / "tercet"), "bench")


def test_it_can_be_imported_by_path() -> None:
    """`tercet bench` can load the file of a checkout that is not on the path."""
    spec = importlib.util.spec_from_file_location("load_by_path", REPOSITORY / "benchmarks/load.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ECHO[-1] == str(REPOSITORY / "benchmarks/load.py")


def test_the_median_of_rounds() -> None:
    """Each figure is the median of its own, and the latencies are those of all rounds."""
    rounds = [load.summarize([second, second], 10 * second, 1e-6 * second) for second in (1, 3, 2)]
    result = load.median(rounds)
    assert result[:4] == (20, 2000, 2000, 2)
    assert result.latencies_ms.tolist() == [1000, 1000, 3000, 3000, 2000, 2000]


def test_a_histogram_has_steps_of_1_2_5() -> None:
    """Every value is counted in its step, empty steps between others too."""
    lines = load.histogram(np.array([0.15, 3.0, 4.0])).splitlines()
    assert [(line.split()[0], line.split()[2], line.split()[-1]) for line in lines] == [
        ("0.1", "0.2", "1"),
        ("0.2", "0.5", "0"),
        ("0.5", "1", "0"),
        ("1", "2", "0"),
        ("2", "5", "2"),
    ]


def test_correct_answers() -> None:
    """An answer has to have the rows of the request and the values of the card's examples, repeated."""
    examples = [SimpleNamespace(output=[0.25, 0.75]), SimpleNamespace(output=[1.0, 0.0])]
    card: Any = SimpleNamespace(output=Tensor(name="y", datatype="FP32", shape=(2,)), examples=examples)
    answer = np.array([[0.25, 0.75], [1, 0], [0.25, 0.75]], np.float32)
    assert load.is_correct(ModelInferResponse(raw_output_contents=[answer.tobytes()]), card, 3)
    assert not load.is_correct(ModelInferResponse(raw_output_contents=[answer.tobytes()]), card, 2)
    assert not load.is_correct(ModelInferResponse(raw_output_contents=[(answer + 0.01).tobytes()]), card, 3)


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["asyncio", "h2load"])
def test_bench(workspace: Path, tmp_path: Path, generator: str) -> None:
    """Either load generator measures the service and both lower bounds; every figure is positive, unless too small to print.

    Below the table, a histogram counts every request of the rounds.
    """
    if generator == "h2load":
        if not (real := shutil.which("h2load")):
            pytest.skip("h2load is not installed (Debian: nghttp2-client)")
        (tmp_path / "h2load").write_text(f'#!/bin/sh\necho used >> "{tmp_path}/used"\nexec {real} "$@"\n')
        (tmp_path / "h2load").chmod(0o755)
    flags = ("fizzbuzz", "--requests", "400", "--rounds", "1", "--models", str(workspace / "models"))
    done = run(*COMMAND, *flags, cwd=REPOSITORY, PATH=f"{BIN}:{tmp_path}")
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
    assert (tmp_path / "used").exists() == (generator == "h2load")


@pytest.mark.slow
def test_an_unknown_model(workspace: Path) -> None:
    """An unknown model is an error that suggests the right name."""
    done = run(*COMMAND, "minst", "--models", str(workspace / "models"), cwd=workspace, check=False)
    assert (done.returncode, done.stdout) == (1, "tercet: No model 'minst'. Did you mean 'mnist'?\n")


@pytest.mark.slow
def test_a_load_that_is_refused(workspace: Path) -> None:
    """A load that the service refuses ends with the service's own message."""
    flags = ("fizzbuzz", "--rows", "5000", "--models", str(workspace / "models"))
    done = run(*COMMAND, *flags, cwd=workspace, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"tercet: inputs[0]: expected 1 to {Config().max_request_rows} rows, got 5000"]
