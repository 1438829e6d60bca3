"""Dynamic batching: requests gather while the engine is busy, and the next batch takes what is waiting.

The batcher knows arrays and futures, and nothing of gRPC; the engine behind it knows nothing of requests.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from tercet.card import Rows
from tercet.errors import DeadlineExceededError, InternalError, QueueFullError, ServiceError, ShuttingDownError
from tercet.server.config import Config
from tercet.server.engine import Engine
from tercet.server.telemetry import ModelTelemetry

EAGER_START_REQUESTS = 32  # start at once with this many: more do not make a batch cheaper, they only crowd the cache
IDLE_TICKS = 24  # iterations of the event loop without a new request before a short batch starts; gRPC needs a few per call
MIN_RETRY_SECONDS = 0.001  # what a full queue asks for at least

Trace = Callable[[float, float, float], None]


@dataclass(eq=False, slots=True)
class _Entry:
    """Rows in the queue and the future of their output. The future is done early when they expire or the caller has left."""

    rows: Rows
    future: asyncio.Future[Rows]
    arrived: float  # seconds on the loop's clock, which may be coarse
    enqueued: float = field(default_factory=time.perf_counter)
    context: Context = field(default_factory=copy_context)  # of the caller, for `trace`


class Batcher:
    """The queue of one model. Use it from one event loop."""

    def __init__(self, engine: Engine, config: Config, telemetry: ModelTelemetry, trace: Trace | None = None) -> None:
        """`engine` may be replaced at any time; the new one runs from the next batch on.

        Batches of up to `engine.inline_rows` rows are so fast that they run on the event loop; larger ones run in a thread while
        requests gather. The thread takes its next batch by itself, so the engine never waits for the loop.
        `trace` is called in the context of each request that ran, with three times of time.perf_counter: its arrival, and the start
        and end of its batch.
        """
        self.engine, self._telemetry, self._trace = engine, telemetry, trace
        self._max_queue_rows, self._queue_timeout, self._max_delay = config.max_queue_rows, config.queue_timeout, config.max_delay
        self._lock = Lock()  # guards the queue, which the thread takes from too
        self._queue: deque[_Entry] = deque()
        self._waiting_rows = 0
        self._seconds_per_row = 0.0  # of the latest batch
        self._rows_at_last_tick, self._ticks_left = 0, IDLE_TICKS
        self._next_start: asyncio.Handle | None = None  # starts the next batch
        self._thread_work: asyncio.Future[None] | None = None  # while the thread runs batches
        self._expiry: asyncio.TimerHandle | None = None  # ends the oldest entry when it has waited too long
        self._executor = ThreadPoolExecutor(1)
        self._closed = False

    async def infer(self, rows: Rows) -> Rows:
        """Run `rows`, (n, ...), and return (n, ...). A request larger than a batch is split.

        Rows that are still waiting when the caller is cancelled are never run. Raises QueueFullError at once when there is no room,
        DeadlineExceededError when the rows have waited too long, ShuttingDownError after `close`, InternalError when `run` failed.
        """
        if self._closed:
            raise ShuttingDownError
        if self._waiting_rows + len(rows) > self._max_queue_rows:
            retry_after = max(MIN_RETRY_SECONDS, self._waiting_rows * self._seconds_per_row)
            raise QueueFullError(self._waiting_rows, self._max_queue_rows, round(retry_after, 3))
        size = self.engine.max_batch_rows
        parts = [self._enqueue(rows[i : i + size]) for i in range(0, len(rows), size)]
        try:
            outputs = await asyncio.gather(*(part.future for part in parts)) if len(parts) > 1 else [await parts[0].future]
        except BaseException:
            for part in parts:
                self._abandon(part)
            raise
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    async def drain(self) -> None:
        """Wait until every request that is waiting now has ended."""
        with self._lock:
            waiting = [entry.future for entry in self._queue]
        if waiting:
            await asyncio.wait(waiting)

    async def close(self) -> None:
        """Accept no more requests, end the waiting ones with ShuttingDownError, and let the running batch finish."""
        self._closed = True
        with self._lock:
            waiting = [self._pop() for _ in range(len(self._queue))]
        _deliver(waiting, ShuttingDownError())
        if self._thread_work:
            await asyncio.wait([self._thread_work])
        self._executor.shutdown()

    def _enqueue(self, rows: Rows) -> _Entry:
        """Queue at most one batch of rows and make sure that a batch will start."""
        loop = asyncio.get_running_loop()
        entry = _Entry(rows, loop.create_future(), loop.time())
        with self._lock:
            self._queue.append(entry)
            self._waiting_rows += len(rows)
        if self._thread_work:  # otherwise they leave the queue at once
            self._telemetry.queue_depth(self._waiting_rows)
        elif self._next_start is None or self._waiting_rows >= self.engine.max_batch_rows:  # a full batch does not wait for more
            if self._next_start:
                self._next_start.cancel()
            self._next_start = loop.call_soon(self._tick)
        if self._expiry is None:
            self._expiry = loop.call_at(entry.arrived + self._queue_timeout, self._expire)
        return entry

    def _pop(self) -> _Entry:
        """Take the oldest entry; hold the lock."""
        entry = self._queue.popleft()
        self._waiting_rows -= len(entry.rows)
        return entry

    def _abandon(self, entry: _Entry) -> None:
        """The caller has left: rows that are still waiting are never run."""
        with self._lock:
            if entry in self._queue:
                self._queue.remove(entry)
                self._waiting_rows -= len(entry.rows)
        if not entry.future.cancel() and not entry.future.cancelled():
            entry.future.exception()  # mark it as retrieved, or asyncio logs it as lost

    def _expire(self) -> None:
        """End the entries that have waited too long, even while the engine is busy; then sleep until the next one is due."""
        loop = asyncio.get_running_loop()
        self._expiry = None
        overdue = []
        with self._lock:
            while self._queue and self._queue[0].arrived + self._queue_timeout <= loop.time():
                overdue.append(self._pop())
            if self._queue:
                self._expiry = loop.call_at(self._queue[0].arrived + self._queue_timeout, self._expire)
        _deliver(overdue, DeadlineExceededError(f"the request was not started within {self._queue_timeout:g} s, the queue's limit"))

    def _tick(self) -> None:
        """Start a batch for the thread at once, a short one when no more requests arrive, and neither before `max_delay`."""
        loop = asyncio.get_running_loop()
        if self._waiting_rows != self._rows_at_last_tick:
            self._rows_at_last_tick, self._ticks_left = self._waiting_rows, IDLE_TICKS
        self._ticks_left -= 1
        delay = self._queue[0].arrived + self._max_delay - loop.time() if self._max_delay and self._queue else 0
        if self._waiting_rows >= self.engine.max_batch_rows:
            self._start()
        elif len(self._queue) < EAGER_START_REQUESTS and self._waiting_rows <= self.engine.inline_rows and self._ticks_left > 0:
            self._next_start = loop.call_soon(self._tick)
        elif delay > 0:
            self._next_start = loop.call_later(delay, self._start)
        else:
            self._start()

    def _start(self) -> None:
        """Run what is waiting: a short batch here and now, a long one in the thread."""
        self._next_start, self._rows_at_last_tick = None, 0
        batch = self._take_batch()
        if sum(len(entry.rows) for entry in batch) > self.engine.inline_rows:
            loop = asyncio.get_running_loop()
            self._thread_work = loop.run_in_executor(self._executor, self._run_in_thread, batch, loop)
            self._thread_work.add_done_callback(self._thread_finished)
        elif batch:
            _deliver(batch, self._run_batch(batch))
            if self._queue:
                self._next_start = asyncio.get_running_loop().call_soon(self._tick)

    def _run_in_thread(self, batch: list[_Entry], loop: asyncio.AbstractEventLoop) -> None:
        """Run this batch, and then the next ones for as long as more rows wait than would run on the loop."""
        while batch:
            loop.call_soon_threadsafe(_deliver, batch, self._run_batch(batch))
            min_rows = self.engine.max_batch_rows if self._max_delay else self.engine.inline_rows + 1
            batch = self._take_batch() if self._waiting_rows >= min_rows else []

    def _thread_finished(self, _: asyncio.Future[None]) -> None:
        """Go on with the rows that are waiting, at once or after `max_delay`."""
        self._thread_work = None
        (self._tick if self._max_delay else self._start)()

    def _take_batch(self) -> list[_Entry]:
        """Take the next batch off the queue: the oldest entries, as many as fit, and at least one unless the queue is empty."""
        batch: list[_Entry] = []
        room = self.engine.max_batch_rows
        with self._lock:
            while self._queue and (self._queue[0].future.done() or not batch or len(self._queue[0].rows) <= room):
                entry = self._pop()
                if not entry.future.done():  # otherwise it has just been cancelled
                    batch.append(entry)
                    room -= len(entry.rows)
        now = time.perf_counter()
        self._telemetry.queue_depth(self._waiting_rows)
        for entry in batch:
            self._telemetry.request_waited(now - entry.enqueued)
        return batch

    def _run_batch(self, batch: list[_Entry]) -> Rows | InternalError:
        """Run the engine. Returns the output of all rows of the batch, (rows, ...), or the error for its requests."""
        started = time.perf_counter()
        try:
            rows = batch[0].rows if len(batch) == 1 else np.concatenate([entry.rows for entry in batch])
            output = self.engine.run(rows)
            if len(output) != len(rows):
                return InternalError(ValueError(f"the engine returned {len(output)} rows for {len(rows)}"))
        except Exception as error:  # noqa: BLE001  any exception fails this batch only
            return InternalError(error)
        seconds = time.perf_counter() - started
        self._seconds_per_row = seconds / len(rows)
        self._telemetry.batch_ran(len(rows), len(batch), seconds)
        if self._trace:
            for entry in batch:
                entry.context.run(self._trace, entry.enqueued, started, started + seconds)
        return output


def _deliver(entries: list[_Entry], output: Rows | ServiceError) -> None:
    """Give each request its rows of the output, or the error."""
    stop = 0
    for entry in entries:
        start, stop = stop, stop + len(entry.rows)
        if entry.future.done():  # the caller has left
            continue
        if isinstance(output, ServiceError):
            entry.future.set_exception(output)
        else:
            entry.future.set_result(output[start:stop])
