"""AsyncClient: the same methods as Client, and asynchronous iterators as input; its behaviour is tested with Client's."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tercet import AsyncClient, Client

from tests.client.test_client import LIMIT, Numbered, limited, rows_ahead  # noqa: F401  a fixture
from tests.conftest import Service


def test_both_clients_have_the_same_methods() -> None:
    """Every public method of Client is one of AsyncClient, with the same parameters."""
    methods = {name: list(inspect.signature(method).parameters) for name, method in public(Client)}
    assert methods == {name: list(inspect.signature(method).parameters) for name, method in public(AsyncClient)}


def public(kind: type) -> list[tuple[str, Callable[..., Any]]]:
    """The public methods of a class."""
    return [member for member in inspect.getmembers(kind, inspect.isfunction) if not member[0].startswith("_")]


async def asynchronous(numbers: Numbered) -> AsyncIterator[int]:
    """The same numbers from an asynchronous iterator."""
    for number in numbers:
        await asyncio.sleep(0)
        yield number


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [1, 2, 7, 20, 1000])
@pytest.mark.parametrize("source", [iter, asynchronous])
def test_a_slow_consumer_holds_the_producer_back(
    limited: Service,  # noqa: F811
    ahead: int,
    source: Callable[[Numbered], Any],
) -> None:
    """A stream never reads more than `ahead` rows past the last prediction that was consumed."""
    numbers, ahead_of_consumer, words = Numbered(), list[int](), list[str]()

    async def main() -> None:
        async with AsyncClient(limited.address) as client:
            async for word in client.answer_each(source(numbers), ahead=ahead):
                ahead_of_consumer.append(numbers.read - len(words))
                words.append(word)
                if len(words) == 5 * LIMIT:
                    break

    asyncio.run(main())
    assert words == ["fizz" * (i % 3 == 0) + "buzz" * (i % 5 == 0) or str(i) for i in range(1, 5 * LIMIT + 1)]
    assert max(ahead_of_consumer) == rows_ahead(ahead)
