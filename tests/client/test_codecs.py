"""Codecs: which rows they accept, how they describe the others, and how batches become chunks."""

import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tercet.client import codecs
from tercet.client.codecs import Codec, DiabetesCodec, DigitsCodec, FizzBuzzCodec, TensorCodec, Word
from tercet.proto.inference_pb2 import DataType, ModelConfig, ModelInput

from tests.conftest import REPOSITORY

LIMIT = 10  # rows of a request
SEVEN = REPOSITORY / "examples" / "seven.png"


@pytest.mark.parametrize(("max_rows", "rows"), [(1, [1] * 9), (2, [2, 2, 1, 2, 2]), (100, [3, 1, 1, 2, 2])])
def test_chunks_are_as_large_as_allowed(monkeypatch: pytest.MonkeyPatch, max_rows: int, rows: list[int]) -> None:
    """A chunk ends when the next row would exceed the limit of rows or of bytes; a row that is too large is alone."""
    monkeypatch.setattr(codecs, "CHUNK_BYTES", 100)
    files = [bytes(size) for size in (30, 30, 30, 30, 500, 20, 20, 90, 5)]
    chunks = DigitsCodec().chunks(files, max_rows)
    requests: list[Any] = [chunk.request for chunk in chunks]
    assert [image.encoded for request in requests for image in request.images] == files
    assert [chunk.rows for chunk in chunks] == rows
    assert [chunk.start for chunk in chunks] == [sum(rows[:i]) for i in range(len(rows))]


WRONG: list[tuple[Codec[Any, Any], Any, type[Exception], str]] = [
    (
        DigitsCodec(),
        [np.zeros((28, 28), np.uint8), np.zeros((28, 28))],
        ValueError,
        r"images\[1\]: expected \(28, 28\) uint8 pixels",
    ),
    (
        DigitsCodec(),
        [np.zeros((280, 280), np.uint8)],
        ValueError,
        r"images\[0\]: .* got \(280, 280\) uint8; send any other picture",
    ),
    (DigitsCodec(), [Image.new("CMYK", (28, 28))], ValueError, r"images\[0\]: .*; convert the image to RGB"),
    (DigitsCodec(), [SEVEN, 7], TypeError, r"images\[1\]: expected a path, .* got 7"),
    (DigitsCodec(), ["nowhere.png"], OSError, "nowhere.png"),
    (DiabetesCodec(), [{}, {"age": 50}], ValueError, r"patients\[1\]: unknown measurement 'age'; expected pregnancies"),
    (DiabetesCodec(), [{"age_years": "50"}], TypeError, r"patients\[0\].age_years: expected a number, got '50'"),
    (DiabetesCodec(), {"age_years": 50}, TypeError, r"patients\[0\]: expected a mapping .* got 'age_years'"),
    (FizzBuzzCodec(), [1, 2.5], TypeError, r"numbers\[1\]: expected an integer, got 2.5"),
    (FizzBuzzCodec(), "15", TypeError, r"numbers\[0\]: expected an integer, got '1'"),
    (FizzBuzzCodec(), [2**63], ValueError, r"numbers\[0\]: expected a 64-bit integer, .* got 9223372036854775808"),
]


@pytest.mark.parametrize(("codec", "rows", "error", "text"), WRONG)
def test_values_that_cannot_be_sent(codec: Codec[Any, Any], rows: Any, error: type[Exception], text: str) -> None:
    """Values of the wrong kind are refused by the client, which says what, which one, and what would be right."""
    with pytest.raises(error, match=text):
        codec.chunks(rows, LIMIT)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([[1, 2]], r"inputs\[0\]: expected UINT8 of shape \[-1, 2, 2\], got int64 of shape \[1, 2\]"),
        ([[[1, 2], [3, 4]], [[5, 256], [7, 8]]], r"inputs\[0\]\[1\]\[0\]\[1\]: expected UINT8, got 256"),
        ([[[1, 2], [3, 0.5]]], r"inputs\[0\]\[0\]\[1\]\[1\]: expected UINT8, got 0.5"),
        ([[[1, 2], [3, np.nan]]], r"inputs\[0\]\[0\]\[1\]\[1\]: expected UINT8, got nan"),
        ([[1, [2, 3]]], r"inputs\[0\]: expected UINT8 of shape \[-1, 2, 2\]: .*inhomogeneous"),
        ([[["1", "2"], ["3", "4"]]], r"inputs\[0\]: expected UINT8 of shape .*, got <U1 of shape"),
    ],
)
def test_numbers_that_cannot_be_sent(rows: Any, text: str) -> None:
    """Numbers that the model's datatype does not have, and other shapes than the model's, are refused, in a batch or alone."""
    codec = TensorCodec(ModelConfig(name="tiny", input=[ModelInput(name="x", data_type=DataType.TYPE_UINT8, dims=[2, 2])]))
    with pytest.raises(ValueError, match=text):
        codec.chunks(rows, LIMIT)
    with pytest.raises(ValueError, match=r"^inputs\[0\]\["):
        list(codecs.chunks(codec, rows, LIMIT))


def test_words_are_text() -> None:
    """A word is equal to its text, and keeps its model when it goes to another process."""
    word = pickle.loads(pickle.dumps(Word("fizz", "fizzbuzz")))  # noqa: S301  our own
    assert (word, word.model, f"{word}!") == ("fizz", "fizzbuzz", "fizz!")
