"""Dynamic batching: while the engine is busy requests gather, and the next batch takes what waits.

It knows arrays and futures, nothing of gRPC; the engine behind it knows nothing of requests.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import numpy as np

from tercet.card import Rows
from tercet.errors import InternalError, QueueFullError, QueueTimeoutError, ShuttingDownError

COMPANY = 32  # requests that share the cost of a start well enough; more at once only crowd the cache
PATIENCE = 24  # ticks of the loop without a new request before a short batch starts: gRPC hands over a call every few ticks


@dataclass(eq=False, slots=True)
class _Waiting:
    """Rows in the queue and the future that their answer goes to; it is done early when they expire or nobody wants them."""

    rows: Rows
    future: asyncio.Future[Rows]
    arrived: float  # seconds on the loop's clock, which may be coarse
    put: float = field(default_factory=time.perf_counter)
    context: Context | None = None  # the caller's, for `trace`


class Observer(Protocol):
    """Is told what a batcher does."""

    def depth(self, rows: int, /) -> None:
        """So many rows wait now."""

    def waited(self, seconds: float, /) -> None:
        """A request was in the queue for so long."""

    def ran(self, rows: int, requests: int, seconds: float, /) -> None:
        """A batch of so many rows, of so many requests, kept the engine busy for so long."""


class Batcher:
    """One model's queue. Use it from one event loop."""

    def __init__(
        self,
        run: Callable[[Rows], Rows],
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        queue_timeout: float,
        max_delay: float = 0.0,
        inline_rows: int = 0,
        observer: Observer | None = None,
        trace: Callable[[float, float, float], None] | None = None,
    ) -> None:
        """`run` maps (batch, ...) to (batch, ...), one call at a time, at most `max_batch_rows` rows a call.

        Batches of up to `inline_rows` rows are so quick that they run on the event loop; larger ones run in a thread, and requests
        gather meanwhile. The thread takes its next batch by itself: the engine never waits for the loop.
        At most `max_queue_rows` rows wait, each for `queue_timeout` seconds; an idle engine waits `max_delay` seconds for company.
        `observer` is told of waiting rows, of each request's time in the queue, and of each batch; from the thread too.
        `trace` is called in the context of each answered request with the time.perf_counter of its arrival and of the begin and the
        end of its batch.
        """
        self._run = run
        self._max_batch_rows, self._max_queue_rows = max_batch_rows, max_queue_rows
        self._queue_timeout, self._max_delay = queue_timeout, max_delay
        self._inline_rows = inline_rows
        self._observer, self._trace = observer, trace
        self._lock = Lock()  # guards the queue, which the thread takes from too
        self._queue: deque[_Waiting] = deque()
        self._waiting_rows = 0
        self._seconds_per_row = 0.0  # of the latest batch
        self._seen, self._patience = 0, PATIENCE  # rows that waited at the latest tick, ticks left
        self._next: asyncio.Handle | None = None  # will start the next batch
        self._running: asyncio.Future[None] | None = None  # the thread's work
        self._timer: asyncio.TimerHandle | None = None  # will end what has waited too long
        self._executor = ThreadPoolExecutor(1)
        self._closed = False

    async def infer(self, rows: Rows) -> Rows:
        """Answer `rows`, (n, ...), with (n, ...). A request larger than a batch is split over several.

        When the caller is cancelled, rows that still wait are never run. Raises QueueFullError at once when there is no room,
        QueueTimeoutError when the rows have waited too long, ShuttingDownError after `close`, InternalError when `run` failed.
        """
        if self._closed:
            raise ShuttingDownError("the service is shutting down: ask another one")
        if self._waiting_rows + len(rows) > self._max_queue_rows:
            retry_after = max(0.001, self._waiting_rows * self._seconds_per_row)
            raise QueueFullError(self._waiting_rows, self._max_queue_rows, round(retry_after, 3))
        parts = [self._put(rows[i : i + self._max_batch_rows]) for i in range(0, len(rows), self._max_batch_rows)]
        try:
            answers = await asyncio.gather(*(part.future for part in parts)) if len(parts) > 1 else [await parts[0].future]
        except BaseException:
            for part in parts:
                self._drop(part)
            raise
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def take_over(self, run: Callable[[Rows], Rows], *, max_batch_rows: int, inline_rows: int) -> None:
        """Let another `run` answer from the next batch on; requests that wait keep their places."""
        with self._lock:
            self._run, self._max_batch_rows, self._inline_rows = run, max_batch_rows, inline_rows

    async def drain(self) -> None:
        """Wait until all that waits now has been answered or ended."""
        with self._lock:
            waiting = [waiting.future for waiting in self._queue]
        if waiting:
            await asyncio.wait(waiting)

    async def close(self) -> None:
        """Take no more requests, end those that wait with ShuttingDownError, and let the running batch finish."""
        self._closed = True
        with self._lock:
            left = list(self._queue)
            self._queue.clear()
        for waiting in left:
            if not waiting.future.done():
                waiting.future.set_exception(ShuttingDownError("the service is shutting down: ask another one"))
        for handle in (self._timer, self._next):
            if handle:
                handle.cancel()
        if self._running:
            await asyncio.wait([self._running])
        self._executor.shutdown()

    def _put(self, rows: Rows) -> _Waiting:
        """Queue at most one batch of rows and make sure that somebody works on the queue."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rows, loop.create_future(), loop.time())
        if self._trace:
            waiting.context = copy_context()
        with self._lock:
            self._queue.append(waiting)
            self._waiting_rows += len(rows)
        if self._observer and self._running:  # else they are as good as gone
            self._observer.depth(self._waiting_rows)
        if self._running is None:
            if self._next and self._waiting_rows >= self._max_batch_rows:  # no need to wait for more
                self._next.cancel()
                self._next = None
            self._next = self._next or loop.call_soon(self._tick)
        if self._timer is None:
            self._timer = loop.call_at(waiting.arrived + self._queue_timeout, self._expire)
        return waiting

    def _pop(self) -> _Waiting:
        """Take the oldest off the queue, with the lock held."""
        waiting = self._queue.popleft()
        self._waiting_rows -= len(waiting.rows)
        return waiting

    def _drop(self, waiting: _Waiting) -> None:
        """Nobody wants this answer any more: if the rows still wait, they never run."""
        with self._lock:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._waiting_rows -= len(waiting.rows)
        if not waiting.future.cancel() and not waiting.future.cancelled():
            waiting.future.exception()  # seen, so that asyncio does not report it as lost

    def _expire(self) -> None:
        """End what has waited too long, now, whatever the engine does; then sleep until the next one would."""
        loop = asyncio.get_running_loop()
        self._timer = None
        late = []
        with self._lock:
            while self._queue and self._queue[0].arrived + self._queue_timeout <= loop.time():
                late.append(self._pop())
            if self._queue:
                self._timer = loop.call_at(self._queue[0].arrived + self._queue_timeout, self._expire)
        reason = f"not started within {self._queue_timeout:g} s, as long as the queue allows"
        for waiting in late:
            if not waiting.future.done():
                waiting.future.set_exception(QueueTimeoutError(reason))

    def _tick(self) -> None:
        """Start the next batch: at once when it goes to the thread, else when requests stop coming, and not before `max_delay`."""
        loop = asyncio.get_running_loop()
        if self._waiting_rows != self._seen:
            self._seen, self._patience = self._waiting_rows, PATIENCE
        self._patience -= 1
        delay = self._queue[0].arrived + self._max_delay - loop.time() if self._max_delay and self._queue else 0
        if self._waiting_rows >= self._max_batch_rows:
            self._start()
        elif len(self._queue) < COMPANY and self._waiting_rows <= self._inline_rows and self._patience > 0:
            self._next = loop.call_soon(self._tick)
        elif delay > 0:
            self._next = loop.call_later(delay, self._start)
        else:
            self._start()

    def _start(self) -> None:
        """Run what waits: a short batch here and now, a long one in the thread."""
        self._next, self._seen = None, 0
        batch = self._take()
        if sum(len(waiting.rows) for waiting in batch) > self._inline_rows:
            loop = asyncio.get_running_loop()
            self._running = loop.run_in_executor(self._executor, self._work, batch, loop)
            self._running.add_done_callback(self._finish)
        elif batch:
            self._deliver(batch, self._attempt(batch))
            if self._queue:
                self._next = asyncio.get_running_loop().call_soon(self._tick)

    def _work(self, batch: list[_Waiting], loop: asyncio.AbstractEventLoop) -> None:
        """In the thread: run this batch, and then the next ones for as long as more rows wait than the loop would run."""
        while batch:
            loop.call_soon_threadsafe(self._deliver, batch, self._attempt(batch))
            least = self._max_batch_rows if self._max_delay else self._inline_rows + 1
            batch = self._take() if self._waiting_rows >= least else []

    def _finish(self, _: asyncio.Future[None]) -> None:
        """The thread has nothing more to do: go on with what waits, at once or when `max_delay` is over."""
        self._running = None
        if not self._closed:
            (self._tick if self._max_delay else self._start)()

    def _take(self) -> list[_Waiting]:
        """The requests of the next batch, oldest first, as many as fit, one at least; none when none wait."""
        batch: list[_Waiting] = []
        room = self._max_batch_rows
        with self._lock:
            while self._queue and (self._queue[0].future.done() or not batch or len(self._queue[0].rows) <= room):
                waiting = self._pop()
                if not waiting.future.done():  # it may have been cancelled a moment ago
                    batch.append(waiting)
                    room -= len(waiting.rows)
        if self._observer:
            now = time.perf_counter()
            self._observer.depth(self._waiting_rows)
            for waiting in batch:
                self._observer.waited(now - waiting.put)
        return batch

    def _attempt(self, batch: list[_Waiting]) -> Rows | InternalError:
        """The answers to a batch, (all its rows, ...), or what its requests get instead."""
        started = time.perf_counter()
        try:
            rows = batch[0].rows if len(batch) == 1 else np.concatenate([waiting.rows for waiting in batch])
            answers = self._run(rows)
            if len(answers) != len(rows):
                return InternalError(ValueError(f"the engine answered {len(rows)} rows with {len(answers)}"))
        except Exception as error:  # noqa: BLE001  whatever it is, it fails this batch and no other
            return InternalError(error)
        seconds = time.perf_counter() - started
        self._seconds_per_row = seconds / len(rows)
        if self._observer:
            self._observer.ran(len(rows), len(batch), seconds)
        if self._trace:
            for waiting in batch:
                if waiting.context:
                    waiting.context.run(self._trace, waiting.put, started, started + seconds)
        return answers

    def _deliver(self, batch: list[_Waiting], answers: Rows | InternalError) -> None:
        """Give each request its part of the answers, or the failure."""
        start = 0
        for waiting in batch:
            stop = start + len(waiting.rows)
            if waiting.future.done():  # nobody wants it any more
                pass
            elif isinstance(answers, InternalError):
                waiting.future.set_exception(answers)
            else:
                waiting.future.set_result(answers[start:stop])
            start = stop
