"""Records: what is predicted before a wrong one, which place an error names, and when input is awaited."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest
from tercet.cli.options import CliError
from tercet.cli.records import ADAPTERS, Adapter, Fields, Record, flatten, predict_all, read_records
from tercet.client import Client

CLIENT = cast("Client", None)


def adapter(*, bad: int | None = None, most: int = 1000, chunk: int = 4) -> Adapter:
    """FizzBuzz whose service predicts `chunk` rows at a time, and rejects the row `bad` or one row in a stream beyond `most`."""

    def predict(_: Client, rows: Iterable[int]) -> Iterator[Fields]:
        words: list[Fields] = []
        for i, row in enumerate(rows):
            if row == bad or i == most:
                raise ValueError(f"numbers[{i}]: {row} is rejected")
            words.append({"word": str(row)})
            if len(words) == chunk:
                yield from words
                words = []
        yield from words

    return ADAPTERS["fizzbuzz"]._replace(predict=predict)


def records(numbers: Iterable[Any]) -> Iterator[list[Record]]:
    """A batch of numbers, each at a place of its own."""
    yield [Record(f"line {number}", number, {}) for number in numbers]


def predict_until_error(adapter: Adapter, numbers: Iterator[list[Record]]) -> tuple[list[str], str]:
    """The words that are predicted, and the error that ends them."""
    words = []
    try:
        for _, fields in predict_all(CLIENT, adapter, numbers):
            words.append(fields["word"])
    except CliError as error:
        return words, error.message
    return words, ""


@pytest.mark.parametrize("bad", range(10))
def test_records_before_a_rejected_one_are_predicted(bad: int) -> None:
    """The record that the service rejects is named by its place, and all before it are predicted once."""
    words, message = predict_until_error(adapter(bad=bad), records(range(10)))
    assert words == [str(number) for number in range(bad)]
    assert message == f"line {bad}: {bad} is rejected"


@pytest.mark.parametrize("end", range(1, 10))
def test_records_before_a_wrong_line_are_predicted(end: int) -> None:
    """The same holds for a record that cannot be read, and the first error counts."""

    def broken() -> Iterator[list[Record]]:
        yield from records(range(end))
        raise CliError("the next line is wrong")

    assert predict_until_error(adapter(), broken()) == ([str(i) for i in range(end)], "the next line is wrong")
    words, message = predict_until_error(adapter(bad=end - 1), broken())
    assert (words, message) == ([str(i) for i in range(end - 1)], f"line {end - 1}: {end - 1} is rejected")


@pytest.mark.parametrize("most", [1, 3, 6])
def test_a_record_that_is_one_too_many_is_tried_again(most: int) -> None:
    """A record that is rejected because of those before it is predicted in the next stream."""
    assert predict_until_error(adapter(most=most), records(range(20))) == ([str(i) for i in range(20)], "")


def test_what_has_arrived_is_predicted_before_more_is_awaited() -> None:
    """Lines that are there are predicted without waiting for the next ones, though they are fewer than a chunk."""
    readable, writable = os.pipe()
    with os.fdopen(readable, "rb") as file, os.fdopen(writable, "wb", buffering=0) as pipe:
        file_records = read_records(adapter(), [], file, "lines")
        words = (fields["word"] for _, fields in predict_all(CLIENT, adapter(), file_records))
        pipe.write(b"1\n2\n3\n")
        assert [next(words) for _ in range(3)] == ["1", "2", "3"]
        pipe.write(b"4\n")
        assert next(words) == "4"
        pipe.write(b"5\nx")
        pipe.close()
        assert next(words) == "5"
        with pytest.raises(CliError, match="line 6: expected a 64-bit integer, got 'x'"):
            next(words)


def test_nested_lists_are_flattened() -> None:
    """A nested list becomes its values, in order."""
    assert flatten([[1, [2]], 3]) == [1, 2, 3]
