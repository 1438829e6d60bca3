"""Engines: calibration, the checks at load, devices."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tercet.card import Card, Rows, read_card
from tercet.client import Client
from tercet.errors import StartupError
from tercet.server.config import Config
from tercet.server.engine import (
    ENGINES,
    MAX_INLINE_SECONDS,
    MIN_BATCH_SECONDS,
    MIN_CALIBRATION_ROWS,
    Engine,
    _log_once,
    calibrate,
    load_engine,
)

import models
from tests.conftest import BIN, REPOSITORY, run, serving
from tests.server.support import answers, refusal


def calibrated(monkeypatch: pytest.MonkeyPatch, most: int, per_row: float, device: str = "cpu") -> tuple[Engine, list[int]]:
    """The engine with limits, and the sizes tried, when a row takes `per_row` seconds and every other run is five times slower."""
    sizes = []

    def run(rows: Rows) -> Rows:
        sizes.append(len(rows))
        return rows

    def repeat(run: Callable[[], Rows], _pause: Any, *, repeat: int, number: int) -> list[float]:
        return [len(run()) * per_row * factor for factor in (1, 5, 1)][: repeat * number]

    monkeypatch.setattr("timeit.repeat", repeat)
    engine = Engine(run=run, name="fake 1", platform="fake", device=device)
    return calibrate(engine, np.zeros((5, 3)), most), sizes


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_smallest_batch_that_takes_long_enough(monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    """The first of the doubled sizes is chosen at which the best run takes MIN_BATCH_SECONDS, and no larger one is tried."""
    rows = factor * MIN_CALIBRATION_ROWS
    engine, sizes = calibrated(monkeypatch, 1024, 1.01 * MIN_BATCH_SECONDS / rows)
    assert (engine.max_batch_rows, sizes[-1]) == (rows, rows)
    assert calibrated(monkeypatch, 1024, 0.99 * MIN_BATCH_SECONDS / rows)[0].max_batch_rows == 2 * rows


@pytest.mark.parametrize("most", [1, 7, 32, 100, 128])
def test_no_batch_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """When even the largest allowed batch is fast, it is chosen, and no larger one is tried."""
    engine, sizes = calibrated(monkeypatch, most, 1e-9)
    assert (engine.max_batch_rows, sizes[-1]) == (most, most)


@pytest.mark.parametrize("per_row", [1e-6, 1e-2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inline_rows(monkeypatch: pytest.MonkeyPatch, device: str, per_row: float) -> None:
    """The CPU runs on the event loop what takes MAX_INLINE_SECONDS; a GPU runs nothing there."""
    expected = MAX_INLINE_SECONDS / per_row if device == "cpu" else 0
    assert calibrated(monkeypatch, 64, per_row, device)[0].inline_rows == pytest.approx(expected, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_model_must_return_the_outputs_in_its_card(workspace: Path, engine: str) -> None:
    """A model whose outputs differ from those in its card by more than rounding is refused; the error names its folder."""
    folder, config = workspace / "models" / "fizzbuzz", Config(engine=engine, device="cpu")
    card = read_card(folder)
    assert load_engine(folder, card, config).run(card.example_rows()).shape == (len(card.examples), *card.output.shape)
    first, *others = card.examples
    shifted = msgspec.structs.replace(first, output=[first.output[0] + 4e-4, *first.output[1:]])
    for examples in ((shifted, *others), (msgspec.structs.replace(first, output=[]), *others[:0])):
        with pytest.raises(StartupError, match=f"{folder}: the model does not return the outputs in its card"):
            load_engine(folder, msgspec.structs.replace(card, examples=examples), config)


@pytest.mark.slow
def test_onnxruntime_keeps_to_itself(tmp_path: Path) -> None:
    """Its telemetry, on by default, is off: it leaves no id in the user's home."""
    for ours in ("tercet.server.engine", "pipeline.evaluate"):
        code = f"import {ours}, onnxruntime; onnxruntime.InferenceSession"
        run("env", "-u", "CI", "-u", "ORT_DISABLE_TELEMETRY", f"HOME={tmp_path}", sys.executable, "-c", code, cwd=REPOSITORY)
    assert not any((tmp_path / ".cache").glob("Microsoft*"))


@pytest.mark.slow
def test_the_device_is_logged_once(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The device and its reason are logged once for all models."""
    caplog.set_level(logging.INFO)
    _log_once.cache_clear()
    for name in ("diabetes", "fizzbuzz"):
        folder = workspace / "models" / name
        load_engine(folder, read_card(folder), Config())
    assert [record.name for record in caplog.records] == ["tercet.server.engine"]


@pytest.mark.slow
@pytest.mark.parametrize("engine_name", ["onnxruntime", "torch"])
def test_cuda_without_gpu(workspace: Path, engine_name: str) -> None:
    """With --device cuda and no visible GPU the service does not fall back to the CPU."""
    flags = ["--models", str(workspace / "models"), "--port", "0", "--device", "cuda", "--engine", engine_name]
    assert "--device cuda: " in refusal(*flags, CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_serves_without_torch(workspace: Path, tmp_path: Path, cards: dict[str, Card]) -> None:
    """The service runs without torch and dvc and never imports them; --engine torch says what to install."""
    for module in ("torch", "dvc"):
        (tmp_path / f"{module}.py").write_text("open(__file__ + '.imported', 'w').close()\nraise ImportError('not installed')\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with serving(workspace / "models", PYTHONPATH=path) as service, Client(service.address) as client:
        for name, card in cards.items():
            np.testing.assert_allclose(client.infer(name, card.example_rows()), answers(card), rtol=0, atol=1e-5)
    assert not list(tmp_path.glob("*.imported"))
    command = (str(BIN / "tercet"), "serve", "--engine", "torch", "--port", "0")
    done = run(*command, cwd=workspace, check=False, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["tercet: the torch engine needs torch: pip install '.[torch]' (not installed)"]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("engine", ENGINES)
def test_cuda_gives_the_answers_of_the_cpu(workspace: Path, cards: dict[str, Card], name: str, engine: str) -> None:
    """An engine returns the same on CUDA and on the CPU, at any batch size."""
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    folder, card = workspace / "models" / name, cards[name]
    cpu, cuda = (load_engine(folder, card, Config(engine=engine, device=device)) for device in ("cpu", "cuda"))
    assert (cpu.device, cuda.device) == ("cpu", "cuda")
    for batch in (1, 2, 7, 1000):
        rows = np.resize(card.example_rows(), (batch, *card.input.shape))
        np.testing.assert_allclose(cuda.run(rows), cpu.run(rows), rtol=0, atol=1e-4)
