"""FizzBuzz as a stream: `python examples/counting.py [HOST:PORT]`, while `tercet serve` is running."""

# %% [markdown]
# # FizzBuzz
# Say the numbers in turn; for multiples of three say "fizz", of five "buzz", of both "fizzbuzz". Two neural networks learned it.

# %%
import itertools
import sys
from collections.abc import Iterator

from tercet import Client

client = Client(sys.argv[1] if sys.argv[1:] else "127.0.0.1:8001")
print(*client.answer([1, 2, 3, 4, 5, 15]))

# %% [markdown]
# ## Which model answers
# A word is a str with the name of its model: the ten-bit network up to 1023, the one for any number of bits beyond.

# %%
for word in client.answer([1023, 1024, 2**63 - 1, -30]):
    print(f"{word:20} by {word.model}")

# %% [markdown]
# ## The service counts
# One call, one stream of words up to the largest 64-bit integer; leaving the loop cancels it.

# %%
for number, word in client.count(1, 2**63 - 1):
    print(word, end=" ")
    if number == 30:
        break
print()

# %% [markdown]
# ## A stream of numbers
# `answer_each` reads numbers from an iterator and yields their words in order. It reads at most `ahead` numbers past the last word
# that was consumed (back-pressure).

# %%
produced: list[int] = []


def squares() -> Iterator[int]:
    """The squares: 1, 4, 9, and so on."""
    for number in itertools.count(1):
        produced.append(number)
        yield number**2


for consumed, word in enumerate(client.answer_each(squares(), ahead=8), 1):
    print(f"{word} ({len(produced) - consumed} ahead)", end=" ")
    if consumed == 20:
        break
print()
