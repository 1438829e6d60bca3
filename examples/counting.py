"""FizzBuzz as a stream: `python examples/counting.py [HOST:PORT]`, beside a service that `tercet serve` has started."""

# %% [markdown]
# # FizzBuzz
# Say the numbers in turn; for multiples of three say "fizz", of five "buzz", of both "fizzbuzz". Two neural nets have learned it.

# %%
import itertools
import sys
from collections.abc import Iterator

from tercet.client import Client

client = Client(sys.argv[1] if sys.argv[1:] else "127.0.0.1:8001")
print(*client.answer([1, 2, 3, 4, 5, 15]))

# %% [markdown]
# ## Who speaks
# A word is a str that knows which model said it: up to 1023 the net of ten bits, beyond it the one that reads any number of bits.

# %%
for word in client.answer([1023, 1024, 2**63 - 1, -30]):
    print(f"{word:20} says {word.model}")

# %% [markdown]
# ## The service counts
# One call, one stream of answers, as far as 64 bits go; who has heard enough leaves.

# %%
for number, word in client.count(1, 2**63 - 1):
    print(word, end=" ")
    if number == 30:
        break
print()

# %% [markdown]
# ## Numbers without an end
# `answer_each` asks for whatever an iterator gives, and yields the words in order. It never reads more than `ahead` numbers beyond
# the words that were taken, so whoever makes the numbers is never far ahead of whoever uses the words.

# %%
made: list[int] = []


def squares() -> Iterator[int]:
    """1, 4, 9, and so on."""
    for number in itertools.count(1):
        made.append(number)
        yield number**2


for taken, word in enumerate(client.answer_each(squares(), ahead=8), 1):
    print(f"{word} ({len(made) - taken} ahead)", end=" ")
    if taken == 20:
        break
print()
