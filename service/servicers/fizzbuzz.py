"""trefoil.v1.FizzBuzz: what to say for a number."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from proto import fizzbuzz_pb2_grpc
from proto.fizzbuzz_pb2 import AnswerRequest, AnswerResponse, CountRequest, CountResponse
from service.card import Card, Rows
from service.errors import InvalidInputError, answers, streams
from service.servicers import Face

CHUNK = 64  # numbers of a count that are asked for at once


class FizzBuzzServicer(Face, fizzbuzz_pb2_grpc.FizzBuzzServicer):
    """Answers with the model `fizzbuzz`."""

    @answers
    async def Answer(self, request: AnswerRequest, _context: Any) -> AnswerResponse:  # noqa: N802
        """Say what to say for each number."""
        model = self._repository.get("fizzbuzz")
        numbers = np.array(request.numbers, dtype=np.int64)
        return AnswerResponse(words=words(numbers, await model.infer(numbers, "numbers[{row}]"), model.card))

    @streams
    async def Count(self, request: CountRequest, _context: Any) -> AsyncIterator[CountResponse]:  # noqa: N802
        """Count from start to stop, both included."""
        model = self._repository.get("fizzbuzz")
        for numbers in chunks(request, model.card):
            for number, word in zip(numbers, words(numbers, await model.infer(numbers, "start"), model.card), strict=True):
                yield CountResponse(number=number, word=word)


def chunks(request: CountRequest, card: Card) -> list[Rows]:
    """The numbers of a count, in pieces. Raises InvalidInputError before the first when any of them is out of range."""
    step = request.step if request.HasField("step") else 1
    if step == 0:
        raise InvalidInputError("step", "0 never ends; leave it out for 1")
    for field in ("start", "stop"):
        card.input.check(np.array([getattr(request, field)]), field)
    numbers = np.arange(request.start, request.stop + (1 if step > 0 else -1), step, dtype=np.int64)
    return [numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)]


def words(numbers: Rows, probabilities: Rows, card: Card) -> list[str]:
    """What to say: the label with the highest probability, or the number itself."""
    labels = [card.labels[i] for i in probabilities.argmax(axis=1)]
    return [str(number) if label == "number" else label for number, label in zip(numbers, labels, strict=True)]
