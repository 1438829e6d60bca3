"""Many requests at once: `python examples/many_requests.py [HOST:PORT]`, beside a service that `tercet serve` has started."""

# %% [markdown]
# # Many requests at once
# A web server, or anything else that runs on asyncio, asks for one row here and one there. They need no gathering: the service does
# that, and answers what waits as one batch.

# %%
import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator

import grpc
from tercet.client import AsyncClient

address = sys.argv[1] if sys.argv[1:] else "127.0.0.1:8001"

# %% [markdown]
# ## One client, many tasks
# All share one connection. Each call has a deadline, and is made again by gRPC when a worker dies or the service is replaced.


# %%
async def many() -> None:
    """A thousand calls of one number each."""
    async with AsyncClient(address) as client:
        answers = await asyncio.gather(*(client.answer([number]) for number in range(1, 1001)))
    print(len(answers), "answers:", dict(Counter(str(word) if word.isalpha() else "number" for [word] in answers).most_common()))


asyncio.run(many())  # in a notebook: await many()

# %% [markdown]
# ## Different models, side by side
# When one call fails, the others are cancelled, as in any task group.


# %%
async def side_by_side() -> None:
    """Three models at once."""
    async with AsyncClient(address) as client, asyncio.TaskGroup() as tasks:
        words = tasks.create_task(client.answer([15]))
        patients = tasks.create_task(client.assess([{"glucose_mg_per_dl": 148, "age_years": 50}]))
        rows = tasks.create_task(client.infer("fizzbuzz_any", [15]))
    print(words.result()[0], patients.result()[0].label, rows.result().argmax())


asyncio.run(side_by_side())

# %% [markdown]
# ## From one stream to another
# What comes from a socket or a queue is asked for as it comes; while answers are not taken, no more is read. With `ahead=1` each
# number is answered before the next one is awaited.


# %%
async def numbers() -> AsyncIterator[int]:
    """As they come from somewhere else."""
    for number in range(1, 16):
        await asyncio.sleep(0)
        yield number


async def streaming() -> None:
    """Answer numbers as they come."""
    async with AsyncClient(address, timeout=5) as client:
        async for word in client.answer_each(numbers(), ahead=1):
            print(word, end=" ")
        print()


asyncio.run(streaming())

# %% [markdown]
# ## When it takes too long
# A call ends when its deadline passes, also in the middle of a stream, and the service stops its work on it.


# %%
async def impatient() -> None:
    """A count that nobody could finish in time."""
    async with AsyncClient(address, timeout=0.5) as client:
        last = 0
        try:
            async for number, _ in client.count(1, 2**62):
                last = number
        except grpc.RpcError as error:
            print("counted to", last, "and then:", error.code().name)


asyncio.run(impatient())
