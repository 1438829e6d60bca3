"""Training in several processes: the same result as in one, on one host and on two, and one sentence when one is lost."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import models
from pipeline.distributed import ALONE, Group, cause, join, launch
from pipeline.prepare import prepare
from pipeline.stage import PipelineError
from pipeline.train import train
from tests.conftest import clone, edit_params, run
from tests.pipeline.torchrun_worker import SEEDS, Outcome, train_all

FOREVER = 1_000_000  # epochs
TRAIN = (sys.executable, "-m", "pipeline.train", "fizzbuzz")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which every model's rows are prepared, none is trained, and fizzbuzz is to be trained in two processes."""
    target = clone(tmp_path_factory.mktemp("torchrun"))
    edit_params(target, mnist__prepare__data="sample", fizzbuzz__train__processes=2, fizzbuzz__train__epochs=2)
    with chdir(target):
        for name in models.names():
            prepare(name)
    return target


@pytest.fixture
def folder(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to do anything with; it is the working folder."""
    copy = shutil.copytree(rows, tmp_path / "tercet")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(scope="module")
def alone(rows: Path) -> dict[str, Outcome]:
    """What this process, on its own, ends each training with."""
    with chdir(rows):
        return train_all(ALONE)


@pytest.fixture(scope="module")
def ranks(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """What each of two processes ends each training with."""
    outcomes = tmp_path_factory.mktemp("outcomes")
    start = f"from pipeline.distributed import launch; launch(2, 'tests.pipeline.torchrun_worker', {str(outcomes)!r})"
    run(sys.executable, "-c", start, cwd=rows)
    return [torch.load(outcomes / f"{rank}.pt", weights_only=True) for rank in range(2)]


def written(folder: Path) -> set[str]:
    """The files of fizzbuzz that training writes and git does not know as they are."""
    lines = run("git", "status", "--porcelain", "--ignored", "models", cwd=folder).stdout.splitlines()
    return {Path(line[3:]).name for line in lines if "__pycache__" not in line}


# The same result


def test_both_ranks_end_with_the_same_weights(ranks: list[dict[str, Outcome]]) -> None:
    """After each training the weights and the figures of the two processes are equal, bit by bit."""
    for name, first in ranks[0].items():
        second = ranks[1][name]
        assert all(torch.equal(first["weights"][weight], second["weights"][weight]) for weight in first["weights"]), name
        assert [point["train"] for point in first["curves"].values()] == [point["train"] for point in second["curves"].values()]


@pytest.mark.parametrize("name", ["fizzbuzz", "diabetes", "fizzbuzz_any"])
def test_gradients_are_those_of_the_whole_batch(alone: dict[str, Outcome], ranks: list[dict[str, Outcome]], name: str) -> None:
    """Where nothing is random but the order of the rows, two processes compute what one does, up to rounding."""
    for weight, expected in alone[name]["weights"].items():
        torch.testing.assert_close(ranks[0][name]["weights"][weight], expected, rtol=0, atol=1e-4)
    for epoch, point in alone[name]["curves"].items():
        for part, figures in point.items():
            assert ranks[0][name]["curves"][epoch][part] == pytest.approx(figures, abs=1e-4)


def test_metrics_are_within_the_spread_over_seeds(alone: dict[str, Outcome], ranks: list[dict[str, Outcome]]) -> None:
    """With augmentation and batch norm, the mean test loss of two processes is that of one, within three standard errors."""
    one, two = (np.array([outcomes[f"mnist {seed}"]["test_loss"] for seed in SEEDS]) for outcomes in (alone, ranks[0]))
    standard_error = np.sqrt((one.var(ddof=1) + two.var(ddof=1)) / len(SEEDS))
    assert 0 < standard_error < 0.2 * one.mean()
    assert abs(one.mean() - two.mean()) < 3 * standard_error


def test_each_rank_has_random_numbers_of_its_own(ranks: list[dict[str, Outcome]]) -> None:
    """The ranks draw different numbers, and the same ones in each run of the seed."""
    first, second = ranks
    assert not torch.equal(first["mnist 0"]["random"], second["mnist 0"]["random"])
    for rank in ranks:
        assert torch.equal(rank["mnist 0"]["random"], rank["mnist again"]["random"])
        assert rank["mnist 0"]["curves"] == rank["mnist again"]["curves"]


def test_one_process_is_the_plain_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `processes: 1` nothing is launched and no process group is made; the checkpoint is the network's own state."""
    edit_params(folder, fizzbuzz__train__processes=1)
    monkeypatch.delattr(dist, "init_process_group")
    monkeypatch.delattr(torchrun, "run")
    train("fizzbuzz")
    assert written(folder) >= {"checkpoint.pt"}


def test_the_stage_launches_the_processes(folder: Path) -> None:
    """With `processes: 2` the stage writes what it writes with one, and only that; names of weights have no prefix."""
    output = run(*TRAIN, cwd=folder).stdout
    assert output.count(" 0/2 ") == 1, output
    state = torch.load("models/fizzbuzz/checkpoint.pt", weights_only=True)
    models.load("fizzbuzz", "network").Network(hidden=64).load_state_dict(state)
    assert written(folder) == {"checkpoint.pt", "metrics.json", "loss.tsv", "accuracy.tsv"}


# One sentence


@contextmanager
def training(*prefix: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`pipeline.train` of fizzbuzz, started; its output is a pipe."""
    command = (*prefix, *TRAIN)
    variables = {**os.environ, **environment}
    with subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.terminate()


def read_until(stream: IO[bytes] | None, text: bytes) -> None:
    """Read until the text has come."""
    assert stream is not None
    seen = b""
    while text not in seen:
        chunk = os.read(stream.fileno(), 4096)
        assert chunk, seen.decode()
        seen += chunk


def said(process: subprocess.Popen[bytes]) -> list[str]:
    """The lines that come until its end, but for the progress bar's."""
    lines = process.communicate()[0].decode().replace("\r", "\n").splitlines()
    return [line for line in lines if line and "epoch/s" not in line and "s/epoch" not in line]


@pytest.mark.parametrize(("rank", "name"), [("0", "SIGKILL"), ("1", "SIGKILL"), (None, "SIGTERM"), (None, "SIGINT")])
def test_a_lost_process_ends_the_run(folder: Path, rank: str | None, name: str) -> None:
    """When a process or the launcher is killed, all end with one sentence and exit code 1, and nothing is written."""
    edit_params(folder, fizzbuzz__train__epochs=FOREVER)
    with training(folder=folder) as process:
        read_until(process.stdout, b"epoch/s")
        workers = psutil.Process(process.pid).children()
        victims = [worker.pid for worker in workers if worker.environ()["RANK"] == rank] or [process.pid]
        os.kill(victims[0], signal.Signals[name])
        who = f"rank {rank} was ended" if rank else "stopped"
        assert said(process) == [f"train fizzbuzz: {who} by {name}: no checkpoint was written, start all processes again"]
    assert process.returncode == 1
    assert not any(worker.is_running() for worker in workers)
    assert written(folder) == set()


def test_errors_of_all_ranks_are_one_sentence(folder: Path) -> None:
    """What every process finds wrong is said once."""
    edit_params(folder, fizzbuzz__train__batch_size=922)
    with training(folder=folder) as process:
        assert said(process) == [
            "train fizzbuzz: batch_size: 922 leaves a batch of 1 of 923 rows for 2 processes; choose one that leaves at least 2"
        ]
    assert process.returncode == 1


def failure(exitcode: int, error_file: Path, seconds: int) -> ProcessFailure:
    """How a process has ended, as torchrun tells it."""
    failed = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file=str(error_file))
    failed.timestamp = seconds
    return failed


def test_the_cause_is_what_came_first(tmp_path: Path) -> None:
    """A sentence is told of what came first; in the same second, of what nobody told; never of those that were stopped."""
    told = tmp_path / "error.json"
    told.write_text('{"message": "no answer", "timestamp": 7}')
    killed, stopped, answerless = failure(-9, tmp_path / "none", 7), failure(-15, tmp_path / "none", 6), failure(1, told, 7)
    assert cause({0: stopped, 1: answerless, 2: killed}).startswith("rank 2 was ended by SIGKILL")
    assert cause({0: stopped, 1: answerless, 2: failure(-9, tmp_path / "none", 8)}) == "no answer"
    assert cause({0: stopped, 3: failure(1, tmp_path / "none", 6)}).startswith("rank 3 ended with exit code 1, see above")


def test_a_batch_has_a_row_for_each_process() -> None:
    """A last batch of fewer rows than processes is refused; one of as many is not."""
    group = Group(rank=0, size=3, hosts=("a", "a", "b"))
    assert group.batches(9, 6) == 2
    with pytest.raises(PipelineError, match="a batch of 2 of 8 rows for 3 processes"):
        group.batches(8, 6)


def test_shares_make_up_the_batch() -> None:
    """The parts of a batch are all of it, once, and their weights average to one."""
    shares = [Group(rank=rank, size=3, hosts=()).share(torch.arange(7)) for rank in range(3)]
    assert torch.equal(torch.cat([part for part, _ in shares]), torch.arange(7))
    assert sum(weight for _, weight in shares) == pytest.approx(3)


def test_torchrun_and_params_yaml_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of processes than params.yaml has is refused, and so is one that the hosts cannot divide."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match="torchrun has started 3"):
        join(2, torch.device("cpu"))
    monkeypatch.setenv("PET_NNODES", "2")
    with pytest.raises(PipelineError, match="3 cannot be divided among 2 hosts"):
        launch(3, "pipeline.train", "fizzbuzz")


def test_settings_and_rows_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with one other value among its rows is refused before the training; one with the same rows is not."""
    digests: list[str] = []

    def gather(found: list[str], own: str) -> None:
        digests.append(own)
        found[:] = digests

    monkeypatch.setattr(dist, "all_gather_object", gather)
    group = Group(rank=0, size=2, hosts=("a", "b"))
    group.check(b"{}", np.arange(4), np.zeros(2))
    group.check(b"{}", np.arange(4), np.zeros(2))
    with pytest.raises(PipelineError, match="differ between the hosts"):
        group.check(b"{}", np.arange(4), np.array([0.0, 1.0]))


# Two hosts


def ip(arguments: str) -> None:
    """Run the command `ip`."""
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)  # noqa: S607  wherever the system has it


@pytest.fixture
def cable() -> Iterator[str]:
    """Two network namespaces, NAME0 with 10.77.0.1 and NAME1 with 10.77.0.2, that only a bridge, NAME, joins."""
    name = f"tf{os.getpid()}"
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command `ip`")
    try:
        ip(f"link add {name} up type bridge")
        for number in range(2):
            host = f"{name}{number}"
            ip(f"netns add {host}")
            ip(f"link add {host} master {name} up type veth peer name net0 netns {host}")
            ip(f"-n {host} addr add 10.77.0.{number + 1}/24 dev net0")
            ip(f"-n {host} link set net0 up")
            ip(f"-n {host} link set lo up")
        yield name
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    finally:
        links = [f"link del {name}{end}" for end in ("0", "1", "")]  # by name: a namespace takes its own down only some time later
        for command in (*links, f"netns del {name}0", f"netns del {name}1"):
            subprocess.run(["ip", *command.split()], check=False, capture_output=True)  # noqa: S607  likewise


@contextmanager
def two_hosts(cable: str, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The training, started on host-0 and host-1, each with a folder of its own."""
    folders = [folder, Path(shutil.copytree(folder, folder.with_name("other")))]
    started = []
    environment = {"PET_NNODES": "2", "PET_MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "net0"}
    for number in range(2):
        name = f'hostname host-{number} && exec "$@"'
        prefix = ("ip", "netns", "exec", f"{cable}{number}", "unshare", "--uts", "sh", "-c", name, "sh")
        started.append(training(*prefix, folder=folders[number], PET_NODE_RANK=str(number), **environment))
    with started[0] as first, started[1] as second:
        yield [first, second]


def test_two_hosts_train_together(cable: str, folder: Path) -> None:
    """Two hosts train one network; rank 0's has the checkpoint, of the weights that two processes on one host come to."""
    here = shutil.copytree(folder, folder.with_name("here"))
    run(*TRAIN, cwd=here)
    with two_hosts(cable, folder) as processes:
        assert [said(process) for process in processes] == [[], []]
    assert [process.returncode for process in processes] == [0, 0]
    found, expected = (torch.load(place / "models/fizzbuzz/checkpoint.pt", weights_only=True) for place in (folder, here))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert written(folder.with_name("other")) == set()


@pytest.mark.timeout(600)  # the hosts wait 35 s for each other, and torch is imported six times
def test_a_host_cut_off_ends_the_run(cable: str, folder: Path) -> None:
    """When no packet passes any more, each host says in one sentence which rank and host it has lost, and writes nothing."""
    edit_params(folder, fizzbuzz__train__epochs=FOREVER)
    with two_hosts(cable, folder) as processes:
        read_until(processes[0].stdout, b"epoch/s")
        ip(f"link set {cable}1 nomaster")
        for process, other in zip(processes, (1, 0), strict=True):
            lost = f"no answer from rank {other} on host-{other}"
            assert said(process) == [f"train fizzbuzz: {lost}: no checkpoint was written, start all processes again"]
    assert [process.returncode for process in processes] == [1, 1]
    assert written(folder) == written(folder.with_name("other")) == set()
