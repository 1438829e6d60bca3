"""tercet.v1.FizzBuzz."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from tercet.card import Card
from tercet.client import Client
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub

from tests.conftest import Service, serving
from tests.server.support import answer, count, fields, labels, refused

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small_service(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with only the model fizzbuzz."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(workspace / "models" / "fizzbuzz", folder / "fizzbuzz")
    with serving(folder) as running:
        yield running


def word_for(number: int, label: str) -> str:
    """The word for a number."""
    return str(number) if label == "number" else label


def test_fizzbuzz_answer(service: Service, cards: dict[str, Card]) -> None:
    """The words are the labels, or the number itself, in the order of the request."""
    numbers = cards["fizzbuzz"].example_rows().tolist()
    expected = [word_for(number, label) for number, label in zip(numbers, labels(cards["fizzbuzz"]), strict=True)]
    with Client(service.address) as client:
        assert client.answer(numbers) == expected
        assert client.answer(numbers[::-1]) == expected[::-1]


@pytest.mark.parametrize(
    ("start", "stop", "step"),
    [(1, 30, 1), (0, 1023, 1), (1, 30, None), (15, 1, -2), (1, 30, 7), (7, 7, 1), (7, 7, -1), (2, 1, 1), (1, 2, -1), (0, 9, 2**62)],
)
def test_fizzbuzz_count(service: Service, channel: grpc.Channel, start: int, stop: int, step: int | None) -> None:
    """Count agrees with Answer, forward and backward, from start to stop, and returns nothing for an empty range."""
    counted = [(found.number, found.word) for found in FizzBuzzStub(channel).Count(CountRequest(start=start, stop=stop, step=step))]
    numbers = list(range(start, stop + (1 if (step or 1) > 0 else -1), step or 1))
    with Client(service.address) as client:
        assert counted == list(zip(numbers, client.answer(numbers) if numbers else [], strict=True))


@pytest.mark.parametrize("numbers", [[5, 1024, 15, -30, 7], [2**63 - 1, -(2**63), 0, 1023, 2**62 + 1], [-1]])
def test_fizzbuzz_answers_every_integer(service: Service, channel: grpc.Channel, numbers: list[int]) -> None:
    """Numbers of any size are answered in order: 0 to 1023 by fizzbuzz, the others by fizzbuzz_any."""
    expected = ["fizz" * (number % 3 == 0) + "buzz" * (number % 5 == 0) or str(number) for number in numbers]
    response = FizzBuzzStub(channel).Answer(AnswerRequest(numbers=numbers))
    assert list(response.words) == expected
    assert list(response.models) == ["fizzbuzz" if 0 <= number < 1024 else "fizzbuzz_any" for number in numbers]
    with Client(service.address) as client:
        assert client.answer(numbers) == expected


@pytest.mark.parametrize(
    ("start", "stop", "step", "models"),
    [
        (1021, 1026, 1, ["fizzbuzz"] * 3 + ["fizzbuzz_any"] * 3),
        (2, -2, -1, ["fizzbuzz"] * 3 + ["fizzbuzz_any"] * 2),
        (2**63 - 3, 2**63 - 1, 1, ["fizzbuzz_any"] * 3),
        (-(2**63), 2**63 - 1, 2**63 - 1, ["fizzbuzz_any"] * 3),
    ],
)
def test_fizzbuzz_counts_as_far_as_64_bits_go(channel: grpc.Channel, start: int, stop: int, step: int, models: list[str]) -> None:
    """A count passes from one model to the other, and names the model of each word."""
    found = list(FizzBuzzStub(channel).Count(CountRequest(start=start, stop=stop, step=step)))
    assert [each.number for each in found] == [start + i * step for i in range(len(models))]
    assert [each.model for each in found] == models


def test_a_count_without_end_begins_at_once(channel: grpc.Channel) -> None:
    """A count that would not fit into memory is computed as it is read, and ends when the client cancels."""
    call = FizzBuzzStub(channel).Count(CountRequest(start=1, stop=2**63 - 1))
    assert [next(call).word for _ in range(5)] == ["1", "2", "fizz", "4", "buzz"]
    call.cancel()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (answer(1, 1024), "numbers[1]"),
        (answer(2**63 - 1), "numbers[0]"),
        (count(-1, 10, 1), "start"),
        (count(1, 1024, 1), "stop"),
    ],
)
def test_numbers_that_no_model_knows(small_service: Service, call: Callable[[grpc.Channel], Any], field: str) -> None:
    """Without fizzbuzz_any, a number outside 0 to 1023 is an error before the first answer."""
    with grpc.insecure_channel(small_service.address) as channel:
        error = refused(lambda: call(channel))
    assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, [field])
    assert "0 to 1023" in error.details()
