"""Clients that need an environment of their own, which `python -m benchmarks.peers --install` makes."""

import ctypes.util
import os
import re
from pathlib import Path

import pytest

import models
from tests.conftest import REPOSITORY, Service, run

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("TERCET_ENVIRONMENTS", REPOSITORY / "benchmarks/.environments"))
CASES = {"kserve": (3, 3), "mlserver": (10, 4)}  # checks that each makes of the service, and of each model


@pytest.mark.parametrize("name", CASES)
def test_peers(default_service: Service, workspace: Path, name: str) -> None:
    """The peer's own client code gets correct answers, or the status code that it expects."""
    python = ENVIRONMENTS / name / "bin/python"
    if not python.exists():
        pytest.skip(f"{name} is not installed in {ENVIRONMENTS}: run `python -m benchmarks.peers --install`")
    command = (str(python), str(HERE / f"{name}_cases.py"), default_service.address, str(workspace / "models"))
    done = run(*command, cwd=HERE, PYTHONPATH="")
    service, model = CASES[name]
    assert len(re.findall("^ok: ", done.stdout, flags=re.MULTILINE)) == service + model * len(models.names()), done.stdout


@pytest.mark.parametrize("flags", [(), ("--streaming", "--async"), ("--async",)], ids=["sync", "streaming", "async"])
def test_perf_analyzer(default_service: Service, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """NVIDIA's load generator reads metadata, config and statistics, and measures without an error."""
    environment = ENVIRONMENTS / "perf_analyzer"
    program = environment / "bin/perf_analyzer"
    if not program.exists():
        pytest.skip(f"perf_analyzer is not installed in {ENVIRONMENTS}: run `python -m benchmarks.peers --install`")
    if not ctypes.util.find_library("b64"):
        pytest.skip("perf_analyzer needs libb64 (Debian: libb64-0d)")
    [libraries] = environment.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")
    target = ["-m", "diabetes", "-u", default_service.address, "-i", "grpc", "-b", "4", "--input-data", "zero"]
    window = ["--measurement-mode", "count_windows", "--measurement-request-count", "50", "-s", "999", "-r", "3", *flags]
    command = (str(program), *target, *window, "-f", str(tmp_path / "report.csv"))
    done = run(*command, cwd=tmp_path, LD_LIBRARY_PATH=str(libraries))
    assert "Avg latency" in done.stdout or "infer/sec" in done.stdout
    assert "Failed to obtain" not in done.stdout
    assert float((tmp_path / "report.csv").read_text().splitlines()[1].split(",")[1]) > 0
