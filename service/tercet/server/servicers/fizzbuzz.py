"""tercet.v1.FizzBuzz: what to say for a number."""

from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from tercet.card import Card, Rows
from tercet.errors import InvalidInputError, answers, streams
from tercet.proto import fizzbuzz_pb2_grpc
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, AnswerResponse, CountRequest, CountResponse
from tercet.server.repository import Model, Repository
from tercet.server.servicers import Face

CHUNK = 64  # numbers of a count that are asked for at once


class FizzBuzzServicer(Face, fizzbuzz_pb2_grpc.FizzBuzzServicer):
    """Answers with the models `fizzbuzz` and `fizzbuzz_any`; see `choose`."""

    @answers
    async def Answer(self, request: AnswerRequest, _context: Any) -> AnswerResponse:  # noqa: N802
        """Say what to say for each number."""
        widest(self._repository).admit(request.numbers, "numbers")
        numbers = np.array(request.numbers, dtype=np.int64)
        said = await say(self._repository, numbers, "numbers[{row}]")
        return AnswerResponse(words=said.words, models=said.models)

    @streams
    async def Count(self, request: CountRequest, _context: Any) -> AsyncIterator[CountResponse]:  # noqa: N802
        """Count from start to stop, both included."""
        for numbers in chunks(request, widest(self._repository).card):
            for number, word, model in zip(numbers, *await say(self._repository, numbers, "start"), strict=True):
                yield CountResponse(number=number, word=word, model=model)


class Said(NamedTuple):
    """What to say for each number, and the names of the models that say so."""

    words: list[str]
    models: list[str]


async def say(repository: Repository, numbers: Rows, where: str) -> Said:
    """Ask the models. `where` names the field that the numbers came from; raises all that Model.infer raises."""
    said = Said([""] * len(numbers), [""] * len(numbers))
    for model, rows in choose(repository, numbers):
        some = numbers[rows]
        for row, word in zip(rows.tolist(), words(some, await model.infer(some, where), model.card), strict=True):
            said.words[row], said.models[row] = word, model.card.name
    return said


def choose(repository: Repository, numbers: Rows) -> list[tuple[Model, Rows]]:
    """Which model answers which rows: `fizzbuzz` the numbers in its range, `fizzbuzz_any` the others, when it is loaded.

    Raises what Repository.get raises.
    """
    small, wide = repository.get("fizzbuzz"), widest(repository)
    [feature] = small.card.input.features
    inside = (numbers >= feature.minimum) & (numbers <= feature.maximum)
    if wide is small or inside.all():
        return [(small, np.arange(len(numbers)))]
    return [(model, rows) for model, rows in ((small, np.flatnonzero(inside)), (wide, np.flatnonzero(~inside))) if len(rows)]


def widest(repository: Repository) -> Model:
    """The model with the widest range that is loaded."""
    return repository.get("fizzbuzz_any" if "fizzbuzz_any" in repository.names() else "fizzbuzz")


def chunks(request: CountRequest, card: Card) -> Iterator[Rows]:
    """The numbers of a count, in pieces. Raises InvalidInputError before the first when any of them is out of range."""
    step = request.step if request.HasField("step") else 1
    if step == 0:
        raise InvalidInputError("step", "0 never ends; leave it out for 1")
    for field in ("start", "stop"):
        card.input.check(np.array([getattr(request, field)]), field)
    numbers = iter(range(request.start, request.stop + (1 if step > 0 else -1), step))
    while chunk := list(islice(numbers, CHUNK)):
        yield np.array(chunk, dtype=np.int64)


def words(numbers: Rows, probabilities: Rows, card: Card) -> list[str]:
    """What to say: the label with the highest probability, or the number itself."""
    labels = [card.labels[i] for i in probabilities.argmax(axis=1)]
    return [str(number) if label == "number" else label for number, label in zip(numbers, labels, strict=True)]
