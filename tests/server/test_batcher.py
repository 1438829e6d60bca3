"""The batcher alone, with an engine that records its batches, and a clock that the test controls."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tercet.card import Rows
from tercet.errors import DeadlineExceededError, InternalError, QueueFullError, ShuttingDownError
from tercet.server.batcher import IDLE_TICKS, Batcher
from tercet.server.config import Config
from tercet.server.engine import Engine

pytestmark = pytest.mark.timeout(60)  # a request that nobody answers shows as a test that does not end

POISON = -1  # the engine fails on a batch that holds it
LIMITS: dict[str, Any] = {"max_queue_rows": 12, "max_request_rows": 12, "queue_timeout": 60.0}
both = pytest.mark.parametrize("inline_rows", [0, 3])  # every batch in the thread, or only the full ones


class FakeEngine:
    """Returns three times each row. The test can hold a batch: see `hold` and `release`."""

    def __init__(self, inline_rows: int = 0) -> None:
        self.batches: list[list[int]] = []  # every batch that was begun
        self.inline: list[bool] = []  # whether it ran on the event loop
        self.held = [0] * (inline_rows + 1)  # rows for `hold`, so many that they go to the thread
        self._open, self._begun = threading.Event(), threading.Event()
        self._open.set()

    def run(self, rows: Rows) -> Rows:
        """(n,) -> (n,)."""
        self.batches.append(rows.tolist())
        self.inline.append(threading.current_thread() is threading.main_thread())
        self._begun.set()
        if not self._open.wait(30):
            raise TimeoutError("the test never released the engine")
        if POISON in rows:
            raise ValueError("secret")
        return rows * 3

    async def hold(self, batcher: Batcher) -> asyncio.Task[Rows]:
        """Keep the engine busy in its thread with `held` until `release`."""
        self._open.clear()
        self._begun.clear()
        [task] = await submit(batcher, self.held)
        await asyncio.to_thread(self._begun.wait)
        return task

    def release(self) -> None:
        """Let the engine work."""
        self._open.set()

    @property
    def executed(self) -> set[int]:
        """Every row that the engine has run."""
        return {row for batch in self.batches for row in batch}


async def ticks() -> None:
    """Run what is ready, including callbacks of callbacks, but no short batch yet; no time passes."""
    for _ in range(5):  # fewer than IDLE_TICKS
        await asyncio.sleep(0)


async def submit(batcher: Batcher, *requests: list[int]) -> list[asyncio.Task[Rows]]:
    """Start a call for each request, in this order; on return they run or wait."""
    tasks = [asyncio.create_task(batcher.infer(np.array(rows))) for rows in requests]
    await ticks()
    return tasks


async def outcomes(tasks: list[asyncio.Task[Rows]]) -> list[Any]:
    """The result of each call: its output as a list, or the class of its error."""
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(result) if isinstance(result, BaseException) else result.tolist() for result in results]


def turn_clock(seconds: float) -> None:
    """Advance the event loop's clock; timers that become due run in the next ticks."""
    loop = asyncio.get_running_loop()
    now = loop.time() + seconds
    loop.time = lambda: now  # type: ignore[method-assign]


def make_engine(run: Callable[[Rows], Rows], max_batch_rows: int, inline_rows: int = 0) -> Engine:
    """An engine with these limits."""
    return Engine(run=run, name="fake 1", platform="fake", device="cpu", max_batch_rows=max_batch_rows, inline_rows=inline_rows)


def make_batcher(run: Callable[[Rows], Rows], max_batch_rows: int = 4, inline_rows: int = 0, **settings: Any) -> Batcher:
    """A batcher that records nothing."""
    return Batcher(make_engine(run, max_batch_rows, inline_rows), Config(**{**LIMITS, **settings}), Mock())


Scenario = Callable[[Batcher, FakeEngine], Coroutine[Any, Any, None]]


def play(scenario: Scenario, **limits: Any) -> FakeEngine:
    """Run a scenario with a new batcher and engine in a new event loop, and close them."""

    async def main() -> FakeEngine:
        engine = FakeEngine(int(limits.get("inline_rows", 0)))
        batcher = make_batcher(engine.run, **limits)
        try:
            await scenario(batcher, engine)
        finally:
            engine.release()
            await batcher.close()
        return engine

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def nothing_lost(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test may leave an exception in a callback or in a future that is never awaited; asyncio logs those."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == "asyncio"] == []


@both
@pytest.mark.parametrize(
    ("requests", "batches"),
    [
        ([[1]], [[1]]),
        ([[1], [2], [3]], [[1, 2, 3]]),
        ([[1, 2], [3, 4], [5]], [[1, 2, 3, 4], [5]]),
        ([[1, 2, 3], [4, 5], [6, 7]], [[1, 2, 3], [4, 5, 6, 7]]),
        ([[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4], [5, 6]]),
        ([[1, 2, 3, 4, 5, 6], [7, 8], [9]], [[1, 2, 3, 4], [5, 6, 7, 8], [9]]),
    ],
)
def test_batches(requests: list[list[int]], batches: list[list[int]], inline_rows: int) -> None:
    """Requests that gather while the engine is busy are merged when they fit; larger ones are split."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        running = await engine.hold(batcher)
        waiting = await submit(batcher, *requests)
        assert engine.batches == [engine.held]
        engine.release()
        assert await outcomes([running, *waiting]) == [engine.held, *([3 * row for row in rows] for rows in requests)]

    engine = play(scenario, inline_rows=inline_rows)
    assert engine.batches == [engine.held, *batches]
    left = [sum(len(batch) for batch in engine.batches[i:]) for i in range(len(engine.batches))]
    assert engine.inline == [rows <= inline_rows for rows in left]


@both
def test_idle_engine_starts_at_once(inline_rows: int) -> None:
    """A lone request to an idle engine is answered while the clock stands still."""

    async def scenario(batcher: Batcher, _engine: FakeEngine) -> None:
        turn_clock(0)
        assert await outcomes(await submit(batcher, [1])) == [[3]]

    play(scenario, inline_rows=inline_rows)


@both
def test_max_delay_gathers(inline_rows: int) -> None:
    """With max_delay an idle engine waits until a batch is full or the oldest request has waited that long."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        turn_clock(0)
        first = await submit(batcher, [1], [2])
        assert engine.batches == []
        full = await submit(batcher, [3, 4])
        await outcomes([*first, *full])
        late = await submit(batcher, [5])
        turn_clock(29)
        late += await submit(batcher, [6])
        assert engine.batches == [[1, 2, 3, 4]]
        turn_clock(1)
        await outcomes(late)

    assert play(scenario, max_delay=30, inline_rows=inline_rows).batches == [[1, 2, 3, 4], [5, 6]]


@both
def test_full_queue_refuses_at_once(inline_rows: int) -> None:
    """A request that does not fit the queue is refused at once, and accepted after a cancelled or expired one has left."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        turn_clock(0)
        running = await engine.hold(batcher)
        waiting = await submit(batcher, [1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
        [refused] = await submit(batcher, [11, 12, 13])
        assert refused.done()
        error = refused.exception()
        assert isinstance(error, QueueFullError)
        assert error.detail
        waiting[0].cancel()
        [late] = await submit(batcher, [14, 15, 16, 17, 18, 19])
        assert not late.done()
        turn_clock(LIMITS["queue_timeout"])
        assert await outcomes([*waiting, late]) == [asyncio.CancelledError, DeadlineExceededError, DeadlineExceededError]
        last = await submit(batcher, list(range(20, 32)))
        engine.release()
        assert await outcomes([running, *last]) == [engine.held, [3 * row for row in range(20, 32)]]

    assert play(scenario, inline_rows=inline_rows).executed == {0, *range(20, 32)}


@both
def test_queue_timeout_ends_what_waits(inline_rows: int) -> None:
    """A request that has waited too long ends while the engine is still busy and never runs; later ones stay."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        turn_clock(0)
        running = await engine.hold(batcher)
        old = await submit(batcher, [1], [2, 3, 4, 5, 6])
        turn_clock(40)
        young = await submit(batcher, [7])
        turn_clock(20)
        assert await outcomes(old) == [DeadlineExceededError, DeadlineExceededError]
        assert not running.done()
        engine.release()
        assert await outcomes([running, *young]) == [engine.held, [21]]

    assert play(scenario, inline_rows=inline_rows).executed == {0, 7}


@both
def test_cancelled_requests_never_run(inline_rows: int) -> None:
    """A cancelled request, split or whole, never runs, and its neighbours do."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        running = await engine.hold(batcher)
        tasks = await submit(batcher, [1], [2], [3, 4, 5, 6, 7], [8, 9])
        for task in (tasks[1], tasks[2]):
            task.cancel()
        engine.release()
        assert await outcomes(tasks) == [[3], asyncio.CancelledError, asyncio.CancelledError, [24, 27]]
        await running

    assert play(scenario, inline_rows=inline_rows).batches[1:] == [[1, 8, 9]]


@both
def test_cancelled_as_it_expires(inline_rows: int) -> None:
    """A caller that cancels in the same tick as its request expires does not affect other timeouts."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        turn_clock(0)
        running = await engine.hold(batcher)
        tasks = await submit(batcher, [1], [2])
        asyncio.get_running_loop().call_later(LIMITS["queue_timeout"] / 2, tasks[0].cancel)
        turn_clock(LIMITS["queue_timeout"])
        await ticks()
        assert tasks[1].done()
        engine.release()
        assert await outcomes([running, *tasks]) == [engine.held, asyncio.CancelledError, DeadlineExceededError]

    assert play(scenario, inline_rows=inline_rows).executed == {0}


@both
def test_cancelled_as_the_engine_frees(inline_rows: int) -> None:
    """A caller that cancels in the same tick as the next batch is assembled is not in it."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        running = await engine.hold(batcher)
        tasks = await submit(batcher, [1], [2, 3, 4, 5])
        tasks[0].cancel()
        engine.release()
        while len(engine.batches) < 2:  # the loop stands still: the thread takes the next batch by itself
            threading.Event().wait(0.001)
        assert await outcomes([running, *tasks]) == [engine.held, asyncio.CancelledError, [6, 9, 12, 15]]

    assert play(scenario, inline_rows=inline_rows).executed == {0, 2, 3, 4, 5}


@both
def test_failure_stays_in_its_batch(caplog: pytest.LogCaptureFixture, inline_rows: int) -> None:
    """An engine failure fails exactly the requests of that batch, with one record in the log, and the next batch works."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        running = await engine.hold(batcher)
        tasks = await submit(batcher, [1, 2], [POISON], [3, 4], [5])
        engine.release()
        assert await outcomes([running, *tasks]) == [engine.held, InternalError, InternalError, [9, 12], [15]]
        errors = {str(task.exception()) for task in tasks[:2]}
        [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [record.getMessage() in error for error in errors] == [True]

    engine = play(scenario, inline_rows=inline_rows)
    assert engine.batches == [engine.held, [1, 2, POISON], [3, 4, 5]]
    assert engine.inline == [False, False, inline_rows > 0]


@pytest.mark.parametrize("answer", [lambda rows: rows[:-1], lambda rows: np.concatenate([rows, rows]), lambda _: None])
@both
def test_wrong_answers_are_failures(answer: Callable[[Rows], Rows], inline_rows: int) -> None:
    """An engine that returns more rows, fewer rows or nothing has failed."""

    async def main() -> None:
        batcher = make_batcher(answer, inline_rows=inline_rows)
        assert await outcomes(await submit(batcher, [1, 2])) == [InternalError]
        await batcher.close()

    asyncio.run(main())


@both
def test_close_ends_waiters(inline_rows: int) -> None:
    """Closing ends waiting and later requests, and lets the running batch finish."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        running = await engine.hold(batcher)
        waiting = await submit(batcher, [1], [2, 3, 4, 5, 6])
        closing = asyncio.create_task(batcher.close())
        assert await outcomes(waiting) == [ShuttingDownError, ShuttingDownError]
        assert await outcomes(await submit(batcher, [7])) == [ShuttingDownError]
        assert not closing.done()
        engine.release()
        await closing
        assert await outcomes([running]) == [engine.held]

    assert play(scenario, inline_rows=inline_rows).executed == {0}


@both
@pytest.mark.parametrize("max_batch_rows", [2, 4, 8])
def test_replace_engine(max_batch_rows: int, inline_rows: int) -> None:
    """Waiting requests keep their places and go to the new engine; the running batch stays with the old one."""
    new = FakeEngine()

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        running = await engine.hold(batcher)
        waiting = await submit(batcher, [1], [2, 3], [4, 5, 6, 7])
        batcher.engine = make_engine(lambda rows: new.run(rows) + 1, max_batch_rows, inline_rows)
        waiting += await submit(batcher, [8])
        assert new.batches == []
        engine.release()
        assert await outcomes([running, *waiting]) == [engine.held, [4], [7, 10], [13, 16, 19, 22], [25]]

    assert play(scenario, inline_rows=inline_rows).executed == {0}
    batches = {2: [[1], [2, 3], [4, 5, 6, 7], [8]], 4: [[1, 2, 3], [4, 5, 6, 7], [8]], 8: [[1, 2, 3, 4, 5, 6, 7, 8]]}
    assert new.batches == batches[max_batch_rows]  # a part that was cut for the old engine is not cut again


@both
def test_take_over_of_an_idle_engine(inline_rows: int) -> None:
    """The very next request goes to the new engine, in batches of its size."""
    new = FakeEngine()

    async def scenario(batcher: Batcher, _engine: FakeEngine) -> None:
        batcher.engine = make_engine(new.run, 2)
        assert await outcomes(await submit(batcher, [1, 2, 3, 4, 5])) == [[3, 6, 9, 12, 15]]

    assert play(scenario, inline_rows=inline_rows).batches == []
    assert new.batches == [[1, 2], [3, 4], [5]]


@both
def test_drain(inline_rows: int) -> None:
    """Draining ends when every waiting request has been answered, has expired or was cancelled, and not before."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        await batcher.drain()
        running = await engine.hold(batcher)
        waiting = await submit(batcher, [1], [2, 3, 4, 5, 6], [7])
        draining = asyncio.create_task(batcher.drain())
        waiting[2].cancel()
        await ticks()
        assert not draining.done()
        engine.release()
        await draining
        assert await outcomes([running, *waiting]) == [engine.held, [3], [6, 9, 12, 15, 18], asyncio.CancelledError]

    assert play(scenario, inline_rows=inline_rows).executed == {0, 1, 2, 3, 4, 5, 6}


def test_inline_batches_merge_what_comes_together() -> None:
    """A short batch waits for requests in the next ticks, without time passing, and then runs on the loop."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        turn_clock(0)
        tasks = await submit(batcher, [1])
        tasks += await submit(batcher, [2], [3])
        assert engine.batches == []
        for _ in range(IDLE_TICKS):
            await asyncio.sleep(0)
        assert all(task.done() for task in tasks)
        assert await outcomes(tasks) == [[3], [6], [9]]

    engine = play(scenario, inline_rows=3)
    assert (engine.batches, engine.inline) == ([[1, 2, 3]], [True])


def test_larger_batches_go_to_the_thread() -> None:
    """A batch of more than inline_rows rows, one request or several, starts in the thread without waiting for more."""

    async def scenario(batcher: Batcher, _engine: FakeEngine) -> None:
        await outcomes(await submit(batcher, [1, 2, 3]))
        await outcomes(await submit(batcher, [4], [5, 6]))
        await outcomes(await submit(batcher, [7, 8]))

    engine = play(scenario, inline_rows=2)
    assert (engine.batches, engine.inline) == ([[1, 2, 3], [4, 5, 6], [7, 8]], [False, False, True])


@pytest.mark.parametrize("end", ["cancel", "expire", "close"])
def test_what_leaves_before_its_inline_batch_never_runs(end: str) -> None:
    """A request that is cancelled, expires or is ended by close before its ticks are over never runs inline."""

    async def scenario(batcher: Batcher, _engine: FakeEngine) -> None:
        turn_clock(0)
        tasks = await submit(batcher, [1], [2])
        if end == "cancel":
            tasks[0].cancel()
        elif end == "expire":
            turn_clock(LIMITS["queue_timeout"])
        else:
            await batcher.close()
        ended = {"cancel": asyncio.CancelledError, "expire": DeadlineExceededError, "close": ShuttingDownError}[end]
        assert await outcomes(tasks) == [ended, [6] if end == "cancel" else ended]
        for _ in range(IDLE_TICKS):
            await asyncio.sleep(0)

    assert play(scenario, inline_rows=3).batches == ([[2]] if end == "cancel" else [])


@both
def test_models_never_wait_for_each_other(inline_rows: int) -> None:
    """While one model's engine is busy in its thread, another model answers short and long requests without time passing."""

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        turn_clock(0)
        running = await engine.hold(batcher)
        waiting = await submit(batcher, [1])
        quick = FakeEngine()
        other = make_batcher(quick.run, inline_rows=inline_rows)
        for rows in ([5], [6, 7, 8, 9]):
            assert await outcomes(await submit(other, rows)) == [[3 * row for row in rows]]
        assert quick.inline == [inline_rows > 0, False]
        assert not running.done()
        assert not waiting[0].done()
        await other.close()
        engine.release()
        assert await outcomes([running, *waiting]) == [engine.held, [3]]

    play(scenario, inline_rows=inline_rows)


REQUEST = st.tuples(st.integers(1, 9), st.sampled_from(["keep", "keep", "keep", "cancel", "poison"]))


@settings(deadline=None, max_examples=100)
@given(rounds=st.lists(st.lists(REQUEST, max_size=12), max_size=3), max_batch_rows=st.integers(1, 8), inline=st.integers(0, 7))
def test_every_row_goes_back_to_its_caller(rounds: list[list[tuple[int, str]]], max_batch_rows: int, inline: int) -> None:
    """No matter what others send, cancel or break, a caller gets the output of its rows, and cancelled rows never run."""
    cancelled: set[int] = set()

    async def scenario(batcher: Batcher, engine: FakeEngine) -> None:
        fresh = iter(range(1, 10_000))
        for requests in rounds:
            await engine.hold(batcher)
            rows = [[next(fresh) for _ in range(size)] for size, _ in requests]
            sent = [[*some, POISON] if fate == "poison" else some for some, (_, fate) in zip(rows, requests, strict=True)]
            tasks = await submit(batcher, *sent)
            for task, some, (_, fate) in zip(tasks, rows, requests, strict=True):
                if fate == "cancel":
                    task.cancel()
                    cancelled.update(some)
            begun = len(engine.batches)
            engine.release()
            results = await outcomes(tasks)
            failed = {row for batch in engine.batches[begun:] if POISON in batch for row in batch}
            for some, (_, fate), result in zip(sent, requests, results, strict=True):
                alone = InternalError if failed.intersection(some) else [3 * row for row in some]
                assert result == (asyncio.CancelledError if fate == "cancel" else alone)

    inline_rows = min(inline, max_batch_rows - 1)  # the batch that holds the engine goes to the thread
    engine = play(scenario, max_batch_rows=max_batch_rows, max_queue_rows=1000, inline_rows=inline_rows)
    assert all(len(batch) <= inline_rows for batch, on_loop in zip(engine.batches, engine.inline, strict=True) if on_loop)
    assert not cancelled & engine.executed
    assert max(map(len, engine.batches), default=0) <= max_batch_rows
