"""Training in several processes gives the result of one, and ends when a process is lost."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import models
from pipeline.prepare import prepare
from tests.conftest import clone, edit_params, run

pytestmark = pytest.mark.slow

ENDLESS = 1_000_000  # epochs
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")
TRAIN = (*TORCHRUN, "-m", "pipeline", "train", "fizzbuzz")
SEEDS = range(6)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the prepared rows of every model and no trained model."""
    target = clone(tmp_path_factory.mktemp("distributed"))
    edit_params(target, mnist__prepare__data="sample", fizzbuzz__train__epochs=2)
    with chdir(target):
        for name in models.names():
            prepare(name)
    return target


@pytest.fixture
def folder(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder."""
    copy = shutil.copytree(rows, tmp_path / "tercet")
    monkeypatch.chdir(copy)
    return copy


def outcomes(rows: Path, folder: Path, *command: str) -> list[Any]:
    """What each process of the worker ends with."""
    run(*command, "-m", "tests.pipeline.distributed_worker", str(folder), cwd=rows)
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]


@pytest.fixture(scope="module")
def alone(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of one process for each training."""
    return outcomes(rows, tmp_path_factory.mktemp("alone"), sys.executable)[0]


@pytest.fixture(scope="module")
def ranks(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The result of each of two processes for each training."""
    return outcomes(rows, tmp_path_factory.mktemp("ranks"), *TORCHRUN)


def test_both_ranks_end_with_the_same_weights(ranks: list[Any]) -> None:
    """After each training the weights of the two processes are equal, bit by bit."""
    assert len(ranks) == 2
    for name, first in ranks[0].items():
        second = ranks[1][name]
        assert all(torch.equal(first["weights"][weight], second["weights"][weight]) for weight in first["weights"]), name


@pytest.mark.parametrize("name", ["fizzbuzz", "diabetes", "fizzbuzz_any"])
def test_gradients_are_those_of_the_whole_batch(alone: Any, ranks: list[Any], name: str) -> None:
    """Without augmentation and batch norm, two processes compute what one does, up to rounding."""
    for weight, expected in alone[name]["weights"].items():
        torch.testing.assert_close(ranks[0][name]["weights"][weight], expected, rtol=0, atol=1e-4)


def test_metrics_are_within_the_spread_over_seeds(alone: Any, ranks: list[Any]) -> None:
    """With augmentation and batch norm, the mean test loss of two processes is that of one, within three standard errors."""
    one, two = (np.array([outcome[f"mnist {seed}"]["test_loss"] for seed in SEEDS]) for outcome in (alone, ranks[0]))
    standard_error = np.sqrt((one.var(ddof=1) + two.var(ddof=1)) / len(SEEDS))
    assert 0 < standard_error < 0.2 * one.mean()
    assert abs(one.mean() - two.mean()) < 3 * standard_error


def test_each_rank_augments_differently(ranks: list[Any]) -> None:
    """The ranks draw different random numbers, and each the same ones in every run with the same seed."""
    first, second = ranks
    assert not torch.equal(first["mnist 0"]["random"], second["mnist 0"]["random"])
    for rank in ranks:
        assert torch.equal(rank["mnist 0"]["random"], rank["mnist again"]["random"])


def test_the_stage_runs_under_torchrun(folder: Path) -> None:
    """Rank 0 writes the model and its curves; the names of the weights have no prefix."""
    run(*TRAIN, cwd=folder)
    state = torch.load("models/fizzbuzz/model.pt", weights_only=True)
    models.load("fizzbuzz", "network").Network(hidden=64).load_state_dict(state)
    curve = folder / "models/fizzbuzz/report/training/plots/metrics/train/loss.tsv"
    assert len(curve.read_text().splitlines()) == 3


def test_a_batch_that_cannot_be_shared_is_an_error(folder: Path) -> None:
    """The sentence says what batch size is expected, and no model is written."""
    edit_params(folder, fizzbuzz__train__batch_size=127)
    ended = run(*TRAIN, cwd=folder, check=False)
    assert ended.returncode != 0
    assert "train fizzbuzz: batch_size: expected a multiple of the 2 processes, got 127" in ended.stdout
    assert "pipeline/train.py" not in ended.stdout  # no traceback of ours
    assert not (folder / "models/fizzbuzz/model.pt").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_lost_process_ends_the_others(folder: Path, rank: str) -> None:
    """When a process is killed, all end with an error, and no model is written."""
    edit_params(folder, fizzbuzz__train__epochs=ENDLESS)
    with subprocess.Popen(TRAIN, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        output = b""
        while b"epoch/s" not in output:
            chunk = os.read(process.stdout.fileno(), 4096)
            assert chunk, output.decode()
            output += chunk
        workers = psutil.Process(process.pid).children()
        (victim,) = (worker for worker in workers if worker.environ()["RANK"] == rank)
        victim.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
    assert process.returncode != 0
    assert not any(worker.is_running() for worker in workers)
    assert not (folder / "models/fizzbuzz/model.pt").exists()
