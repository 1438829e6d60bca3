"""The command line: answers that a person reads, and errors that are one sentence."""

import json
import socket
from pathlib import Path

import pytest

from service.client import MEASUREMENTS
from tests.conftest import REPOSITORY, Service, run


def ask(service: Service, arguments: str, status: int = 0) -> str:
    """What `trefoil` prints, asked of a service; it must exit with `status`."""
    done = run("trefoil", *arguments.split(), cwd=REPOSITORY, check=False, TREFOIL_SERVER=service.address)
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("predict mnist nowhere.png", "nowhere.png cannot be read"),
        ("predict mnist README.md", "images[0].encoded"),
        ("predict diabetes glucose=high", "'high' is no number"),
        ("predict diabetes height=180", "names no measurement"),
        ("predict diabetes 1 2 3", f"give {len(MEASUREMENTS)} in the order"),
        ("predict diabetes glucose=-1", "patients[0].glucose_mg_per_dl"),
        ("predict fizzbuzz 2.5", "no whole number"),
        ("predict fizzbuzz 9223372036854775808", "no whole number of 64 bits"),
        ("predict tulips [[1]]", "there is no model 'tulips'"),
        ("fizzbuzz 1 9 0", "step"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(default_service: Service, arguments: str, sentence: str) -> None:
    """What cannot be answered ends with exit code 1 and one line that says why."""
    printed = ask(default_service, arguments, status=1)
    assert sentence in printed
    assert printed.count("\n") == 1


def test_no_service_is_answered_with_a_hint() -> None:
    """When nothing listens, the command says how to start a service."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening: nobody else gets the port
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("trefoil", "fizzbuzz", "1", "3", cwd=REPOSITORY, check=False, TREFOIL_SERVER=address)
    assert done.returncode == 1
    assert "trefoil serve" in done.stdout
    assert "Traceback" not in done.stdout


def test_json_is_one_line_an_answer(default_service: Service) -> None:
    """`--json` prints what a program reads, also for a model asked over the Open Inference Protocol."""
    printed = ask(default_service, "predict fizzbuzz 15 16 --json").splitlines()
    assert [json.loads(line) for line in printed] == [{"number": 15, "word": "fizzbuzz"}, {"number": 16, "word": "16"}]


def test_measurements_may_be_shortened_or_left_out(default_service: Service) -> None:
    """Names and positions say the same."""
    named = ask(default_service, "predict diabetes glu=148 age=50")
    assert named == ask(default_service, "predict diabetes - 148 - - - - - 50")
    assert "positive test" in named


def test_models_lists_what_is_trained(workspace: Path) -> None:
    """`trefoil models` shows figures, origin, units and labels of each trained model, and which are not trained."""
    (workspace / "models" / "untrained").mkdir()
    (workspace / "models" / "untrained" / "contract.py").touch()
    try:
        lines = run("trefoil", "models", cwd=workspace).stdout.splitlines()
    finally:
        (workspace / "models" / "untrained" / "contract.py").unlink()
        (workspace / "models" / "untrained").rmdir()
    start = next(i for i, line in enumerate(lines) if line.startswith("diabetes"))
    figures, origin, columns = lines[start : start + 3]
    assert "accuracy" in figures
    assert "data full" in origin
    assert "commit" in origin
    assert "bmi_kg_per_m2 (kg/m²)" in columns
    assert columns.endswith("negative, positive")
    assert next(line for line in lines if "not trained" in line).startswith("untrained")


def test_serving_without_its_packages_says_what_to_install(workspace: Path, tmp_path: Path) -> None:
    """Where only a client is installed, `trefoil serve` ends in one sentence."""
    (tmp_path / "uvloop.py").write_text("raise ImportError('not installed')\n")
    done = run("trefoil", "serve", "--port", "0", cwd=workspace, check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["trefoil: serving needs more packages: pip install 'trefoil[serve]' (not installed)"]
