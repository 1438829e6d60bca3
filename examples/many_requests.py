"""Many requests at once: `python examples/many_requests.py [HOST:PORT]`, while `tercet serve` is running."""

# %% [markdown]
# # Many requests at once
# A web server, or any other asyncio program, predicts a row here and a row there. It does not need to collect them: the service
# batches the requests that are waiting.

# %%
import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator

import grpc
from tercet import AsyncClient

address = sys.argv[1] if sys.argv[1:] else "127.0.0.1:8001"

# %% [markdown]
# ## One client, many tasks
# They share one connection. Each call has a deadline, and gRPC retries it when a worker dies or the service is replaced.


# %%
async def many() -> None:
    """A thousand calls of one number each."""
    async with AsyncClient(address) as client:
        answers = await asyncio.gather(*(client.answer([number]) for number in range(1, 1001)))
    print(len(answers), "answers:", dict(Counter(str(word) if word.isalpha() else "number" for [word] in answers).most_common()))


asyncio.run(many())  # in a notebook: await many()

# %% [markdown]
# ## Different models at once
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
# Rows from a socket or a queue are sent as they arrive, and no more are read while predictions are not consumed. With `ahead=1`
# each number is answered before the next one is awaited.


# %%
async def numbers() -> AsyncIterator[int]:
    """Numbers from some other source."""
    for number in range(1, 16):
        await asyncio.sleep(0)
        yield number


async def streaming() -> None:
    """Answer numbers as they arrive."""
    async with AsyncClient(address, timeout=5) as client:
        async for word in client.answer_each(numbers(), ahead=1):
            print(word, end=" ")
        print()


asyncio.run(streaming())

# %% [markdown]
# ## Deadlines
# A call ends when its deadline passes, even in the middle of a stream, and the service stops working on it.


# %%
async def impatient() -> None:
    """A count that cannot finish in time."""
    async with AsyncClient(address, timeout=0.5) as client:
        last = 0
        try:
            async for number, _ in client.count(1, 2**62):
                last = number
        except grpc.RpcError as error:
            print("counted to", last, "and then:", error.code().name)


asyncio.run(impatient())
