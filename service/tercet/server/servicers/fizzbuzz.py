"""tercet.v1.FizzBuzz: the word for a number, or for each number of a range."""

from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any

import numpy as np

from tercet.card import Card, Rows
from tercet.errors import InvalidInputError
from tercet.proto import fizzbuzz_pb2 as pb
from tercet.proto import fizzbuzz_pb2_grpc
from tercet.server.repository import Model, Repository
from tercet.server.rpc import BaseServicer

COUNT_CHUNK_ROWS = 64  # numbers of a Count per call of the model


class FizzBuzzServicer(BaseServicer, fizzbuzz_pb2_grpc.FizzBuzzServicer):
    """Answers with the models `fizzbuzz` and `fizzbuzz_any`; see `answer_numbers`."""

    async def Answer(self, request: pb.AnswerRequest, _context: Any) -> pb.AnswerResponse:
        widest_model(self.repository).check_row_count(request.numbers, "numbers")
        numbers = np.array(request.numbers, dtype=np.int64)
        words, models = await answer_numbers(self.repository, numbers, "numbers[{row}]")
        return pb.AnswerResponse(words=words, models=models)

    async def Count(self, request: pb.CountRequest, _context: Any) -> AsyncIterator[pb.CountResponse]:
        for numbers in count_chunks(request, widest_model(self.repository).card):
            answers = await answer_numbers(self.repository, numbers, "start")
            for number, word, model in zip(numbers, *answers, strict=True):
                yield pb.CountResponse(number=number, word=word, model=model)


async def answer_numbers(repository: Repository, numbers: Rows, field: str) -> tuple[list[str], list[str]]:
    """For each of `numbers`, (n,) int64, the word and the model that predicted it: `fizzbuzz` in its range, else `fizzbuzz_any`.

    Raises what Repository.get and Model.infer raise.
    """
    small, wide = repository.get("fizzbuzz"), widest_model(repository)
    [feature] = small.card.input.features
    for_small = (numbers >= feature.minimum) & (numbers <= feature.maximum) | (small is wide)
    words, models = [""] * len(numbers), [""] * len(numbers)
    for model, mask in ((small, for_small), (wide, ~for_small)):
        rows = np.flatnonzero(mask)
        if len(rows):
            probabilities = await model.infer(numbers[rows], field)
            for row, best in zip(rows, probabilities.argmax(axis=1), strict=True):
                label = model.card.labels[best]
                words[row], models[row] = str(numbers[row]) if label == "number" else label, model.card.name
    return words, models


def widest_model(repository: Repository) -> Model:
    """`fizzbuzz_any` if it is loaded, else `fizzbuzz`. Raises what Repository.get raises."""
    return repository.get("fizzbuzz_any" if "fizzbuzz_any" in repository.loaded_names() else "fizzbuzz")


def count_chunks(request: pb.CountRequest, card: Card) -> Iterator[Rows]:
    """The numbers of a Count, chunk by chunk. Raises InvalidInputError before the first when any of them is out of range."""
    step = request.step if request.HasField("step") else 1
    if step == 0:
        raise InvalidInputError("step", "must not be 0; leave it out for 1")
    for field in ("start", "stop"):
        card.input.check(np.array([getattr(request, field)]), field)
    numbers = iter(range(request.start, request.stop + (1 if step > 0 else -1), step))
    while chunk := list(islice(numbers, COUNT_CHUNK_ROWS)):
        yield np.array(chunk, dtype=np.int64)
