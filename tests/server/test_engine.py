"""What an engine is measured and checked for at load."""

import logging
import sys
from itertools import cycle
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tercet.card import Rows, read_card
from tercet.errors import StartupError
from tercet.server.config import Config
from tercet.server.engine import BATCH_SECONDS, ENGINES, INLINE_SECONDS, SMALLEST_BATCH, Engine, Pace, _tell, load_engine, measure

from tests.conftest import REPOSITORY, run


class FakeEngine:
    """Writes down the size of every batch."""

    platform = "fake"
    name = "fake 1"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.sizes: list[int] = []

    def run(self, rows: Rows) -> Rows:
        """(n, 3) -> (n, 3)."""
        self.sizes.append(len(rows))
        return rows


def paces(monkeypatch: pytest.MonkeyPatch, most: int, per_row: float, device: str = "cpu") -> tuple[Pace, list[int]]:
    """What is measured, and the sizes tried, when a row takes `per_row` seconds and every other run is slowed down by others."""

    def seconds(engine: Engine, batch: Rows) -> float:
        return len(engine.run(batch)) * per_row * next(noise)

    noise = cycle([1, 5])
    monkeypatch.setattr("tercet.server.engine._seconds", seconds)
    engine = FakeEngine(device)
    pace = measure(engine, np.zeros((5, 3)), most)
    return pace, sorted(set(engine.sizes))


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_smallest_batch_that_takes_long_enough(monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    """The first of the doubled sizes is chosen whose best run takes BATCH_SECONDS, and no larger one is tried."""
    rows = factor * SMALLEST_BATCH
    pace, sizes = paces(monkeypatch, 1024, 1.01 * BATCH_SECONDS / rows)
    assert (pace.batch_rows, sizes[-1]) == (rows, rows)
    assert paces(monkeypatch, 1024, 0.99 * BATCH_SECONDS / rows)[0].batch_rows == 2 * rows


@pytest.mark.parametrize("most", [1, 7, 32, 100, 128])
def test_no_batch_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Where even the largest batch allowed is quick, that one is chosen, and no larger one is tried."""
    pace, sizes = paces(monkeypatch, most, 1e-9)
    assert (pace.batch_rows, sizes[-1]) == (most, most)


@pytest.mark.parametrize("per_row", [1e-6, 1e-2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inline_rows(monkeypatch: pytest.MonkeyPatch, device: str, per_row: float) -> None:
    """As many rows run on the event loop as the CPU answers in INLINE_SECONDS; on a GPU none do."""
    expected = INLINE_SECONDS / per_row if device == "cpu" else 0
    assert paces(monkeypatch, 64, per_row, device)[0].inline_rows == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_model_must_give_the_answers_of_its_card(workspace: Path, engine: str) -> None:
    """A model whose answers differ from those of its card by more than the last digits is refused, with its folder."""
    folder, config = workspace / "models" / "fizzbuzz", Config(engine=engine, device="cpu")
    card = read_card(folder)
    assert load_engine(folder, card, config).run(card.example_rows()).shape == (len(card.examples), *card.output.shape)
    first, *others = card.examples
    shifted = msgspec.structs.replace(first, output=[first.output[0] + 4e-4, *first.output[1:]])
    for examples in ((shifted, *others), (msgspec.structs.replace(first, output=[]), *others[:0])):
        with pytest.raises(StartupError, match=f"{folder}: the model does not give the answers of its card"):
            load_engine(folder, msgspec.structs.replace(card, examples=examples), config)


def test_onnxruntime_keeps_to_itself(tmp_path: Path) -> None:
    """Its telemetry, which is on by default, is off: it leaves no id in the user's home, from where it would be sent on."""
    for ours in ("tercet.server.engine", "pipeline.evaluate"):
        code = f"import {ours}, onnxruntime; onnxruntime.InferenceSession"
        run("env", "-u", "CI", "-u", "ORT_DISABLE_TELEMETRY", f"HOME={tmp_path}", sys.executable, "-c", code, cwd=REPOSITORY)
    assert not any((tmp_path / ".cache").glob("Microsoft*"))


def test_the_device_is_told_once(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Why models run on the CPU, or a GPU, is logged once, however many there are."""
    caplog.set_level(logging.INFO)
    _tell.cache_clear()
    for name in ("diabetes", "fizzbuzz"):
        folder = workspace / "models" / name
        load_engine(folder, read_card(folder), Config())
    assert [record.name for record in caplog.records] == ["tercet.server.engine"]
