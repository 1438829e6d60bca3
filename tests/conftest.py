"""Real files from real (small) trainings, a real service on a free port, a real channel."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml
from filelock import FileLock

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*command: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment in a folder; stdout and stderr come together in `stdout`."""
    variables = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    done = subprocess.run(command, cwd=cwd, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}"
    return done


def clone(target: Path) -> Path:
    """A git repository with the files of this one as they lie in the working tree."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, target / name)
    for command in ("init -q", "add -A", "-c user.name=test -c user.email=test@localhost commit -qm test"):
        run("git", *command.split(), cwd=target)
    return target


def edit_params(workspace: Path, **changes: object) -> None:
    """Set entries of params.yaml; `mnist__train__epochs=3` is models.mnist.train.epochs."""
    path = workspace / "params.yaml"
    tree = yaml.safe_load(path.read_text())
    for dotted, value in changes.items():
        node = tree["models"]
        *parents, last = dotted.split("__")
        for key in parents:
            node = node[key]
        node[last] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A clone in which `dvc repro` has trained every model, MNIST briefly on the sample. Tests leave it as they found it.

    It is built once for all processes of pytest-xdist. TERCET_TEST_WORKSPACE names a folder in which it is kept for the next run.
    """
    base = tmp_path_factory.getbasetemp()
    target = Path(os.environ.get("TERCET_TEST_WORKSPACE") or (base if worker_id == "master" else base.parent) / "trained")
    with FileLock(f"{target}.lock"):
        done = Path(f"{target}.done")
        if not done.exists():
            train_all(target)
            done.touch()
    return target


def train_all(target: Path) -> None:
    """Clone into `target` and train."""
    clone(target)
    edit_params(target, mnist__prepare__data="sample", mnist__train__epochs=2, mnist__evaluate__gates={"sample": {"accuracy": 0.9}})
    edit_params(target, diabetes__cross_validate__repeats=1, diabetes__cross_validate__folds=3, diabetes__cross_validate__gates={})
    run("dvc", "repro", cwd=target)
    run("git", "add", "-A", cwd=target)
    run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "trained", cwd=target)


@dataclass(frozen=True)
class Service:
    """A running `tercet serve`."""

    process: subprocess.Popen[str]
    address: str
    engine: str


@contextmanager
def serving(models: Path, *flags: str, engine: str = "onnxruntime", **environment: str) -> Iterator[Service]:
    """Start `tercet serve` on a free port and stop it with SIGTERM; it must then exit with 0."""
    command = [str(BIN / "tercet"), "serve", "--port", "0", "--models", str(models), "--engine", engine, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert " at " in first, f"{' '.join(command)} did not start"
        try:
            yield Service(process, first.rsplit(" at ", 1)[1].strip(), engine)
        finally:
            process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="session", params=["onnxruntime", "torch"])
def service(request: pytest.FixtureRequest, workspace: Path) -> Iterator[Service]:
    """The service on the trained models, once with each engine."""
    with serving(workspace / "models", engine=request.param) as running:
        yield running


@pytest.fixture(scope="session")
def default_service(workspace: Path) -> Iterator[Service]:
    """The service on the trained models, with the default engine."""
    with serving(workspace / "models") as running:
        yield running


@pytest.fixture
def channel(service: Service) -> Iterator[grpc.Channel]:
    """A channel to the service."""
    with grpc.insecure_channel(service.address) as opened:
        yield opened


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the trained workspace as slow, and let one process train it while another runs what does without.

    `--dist worksteal` gives each of two processes one half of the tests, so the others start in the middle.
    """
    needing: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (needing if "workspace" in getattr(item, "fixturenames", ()) else others).append(item)
    for item in needing:
        item.add_marker(pytest.mark.slow)
    middle = len(items) // 2
    items[:] = [*needing[:middle], *others, *needing[middle:]]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run in CI when a test was skipped for any other reason than a missing GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and os.environ.get("CI"):
        skipped = [report for report in reporter.stats.get("skipped", []) if "GPU" not in str(report.longrepr)]
        if skipped:
            reporter.write_line(f"skipped in CI: {', '.join(report.nodeid for report in skipped)}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
