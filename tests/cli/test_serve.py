"""`tercet serve`: what it prints at its start."""

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run, serving

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_serve_announces_what_runs(workspace: Path, tmp_path: Path, engine: str, workers: str) -> None:
    """The service prints the engine of each model, the number of processes, and commands to try, which work."""
    (tmp_path / "tokens").write_text("TOKEN\n")
    flags = ("--workers", workers, "--token-file", str(tmp_path / "tokens"))
    with serving(workspace / "models", *flags, engine=engine) as service:
        assert service.process.stdout
        lines = list(iter(service.process.stdout.readline, "  tercet fizzbuzz 1 30\n"))
        commands = [line.strip() for line in lines[lines.index("try:\n") + 1 :]]
        assert f"export TERCET_SERVER={service.address}" in commands
        run("sh", "-ec", "\n".join(commands), cwd=workspace)
    assert [line.split()[0] for line in lines if f" {engine} " in line and line.endswith((" on cpu\n", " on cuda\n"))] == [
        "diabetes",
        "fizzbuzz",
        "fizzbuzz_any",
        "mnist",
    ]
    assert ("each in 2 processes\n" in lines) == (workers == "2")


def test_serving_without_its_packages_says_what_to_install(workspace: Path, tmp_path: Path) -> None:
    """In a plain client install `tercet serve` explains what to install."""
    (tmp_path / "uvloop.py").write_text("raise ImportError('not installed')\n")
    done = run("tercet", "serve", "--port", "0", cwd=workspace, check=False, PYTHONPATH=f"{tmp_path}:{REPOSITORY / 'service'}")
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["tercet: `tercet serve` needs more packages: pip install '.[serve]' (not installed)"]
