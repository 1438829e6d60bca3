"""The wheel, installed next to packages that other people have."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "service", source / "service", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(source), str(source), cwd=source)
    [built] = source.glob("*.whl")
    return built


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that sees the packages installed here, but not the editable install of tercet."""
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    packages = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    Path(packages, "here.pth").write_text(sysconfig.get_path("purelib"))
    return python


def ask(python: Path, models: Path) -> str:
    """Serve `models` with the installed command, ask it once with the installed command."""
    command = [str(python.with_name("tercet")), "serve", "--port", "0", "--models", str(models)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=python.parent) as server:
        assert server.stdout
        address = server.stdout.readline().split()[-1]
        try:
            server_option = ["--server", address]
            return run(str(python.with_name("tercet")), "predict", "fizzbuzz", "15", *server_option, cwd=python.parent).stdout
        finally:
            server.terminate()


@pytest.mark.parametrize("order", [("tercet", "proto-plus"), ("proto-plus", "tercet")], ids=["before", "after"])
def test_lives_next_to_proto_plus(environment: Path, wheel: Path, workspace: Path, order: tuple[str, str], tmp_path: Path) -> None:
    """Installed before or after proto-plus, both work; and each still works once the other is uninstalled."""
    install = {"tercet": str(wheel), "proto-plus": "proto-plus"}

    def pip(*arguments: str) -> None:
        run(str(environment), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, cwd=tmp_path)

    def uses_proto_plus() -> str:
        code = (
            "import proto; print(type('M', (proto.Message,), {'__module__': 'm', 'x': proto.Field(proto.INT32, number=1)})(x=3).x)"
        )
        return run(str(environment), "-c", code, cwd=tmp_path).stdout

    for name in order:
        pip("install", "--no-deps", install[name])
    assert uses_proto_plus() == "3\n"
    assert ask(environment, workspace / "models") == "fizzbuzz\n"
    pip("uninstall", "--yes", order[0])
    if order[0] == "tercet":
        assert uses_proto_plus() == "3\n"
    else:
        assert ask(environment, workspace / "models") == "fizzbuzz\n"


def test_the_wheel_installs_one_package(wheel: Path) -> None:
    """The wheel has one top-level package, the generated code, the type marker, and nothing of models/ or pipeline/."""
    names = run(sys.executable, "-m", "zipfile", "--list", str(wheel), cwd=REPOSITORY).stdout.split()
    paths = [name for name in names if "/" in name]
    assert {path.partition("/")[0] for path in paths if ".dist-info/" not in path} == {"tercet"}
    assert {"tercet/py.typed", "tercet/proto/inference_pb2.py"} <= {*paths}
