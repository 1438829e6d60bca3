"""Dynamic batching: while the engine is busy requests gather, and the next batch takes what waits.

It knows arrays and futures, nothing of gRPC; the engine behind it knows nothing of requests.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from service.card import Rows
from service.errors import InternalError, QueueFullError, QueueTimeoutError, ShuttingDownError


@dataclass(eq=False, slots=True)
class _Waiting:
    """Rows in the queue and the future that their answer goes to; it is done early when they expire or nobody wants them."""

    rows: Rows
    future: asyncio.Future[Rows]
    arrived: float  # seconds on the loop's clock


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
    ) -> None:
        """`run` maps (batch, ...) to (batch, ...) in a thread of its own, one call at a time, at most `max_batch_rows` rows a call.

        At most `max_queue_rows` rows wait, each for `queue_timeout` seconds; an idle engine waits `max_delay` seconds for company.
        """
        self._run = run
        self._max_batch_rows, self._max_queue_rows = max_batch_rows, max_queue_rows
        self._queue_timeout, self._max_delay = queue_timeout, max_delay
        self._queue: deque[_Waiting] = deque()
        self._waiting_rows = 0
        self._seconds_per_row = 0.0  # of the latest batch
        self._full = asyncio.Event()  # a whole batch waits
        self._worker: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
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

    async def close(self) -> None:
        """Take no more requests, end those that wait with ShuttingDownError, and let the running batch finish."""
        self._closed = True
        for waiting in self._queue:
            if not waiting.future.done():
                waiting.future.set_exception(ShuttingDownError("the service is shutting down: ask another one"))
        self._queue.clear()
        if self._timer:
            self._timer.cancel()
        if self._worker:
            self._full.set()
            await self._worker
        self._executor.shutdown()

    def _put(self, rows: Rows) -> _Waiting:
        """Queue at most one batch of rows and make sure that somebody works on the queue."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rows, loop.create_future(), loop.time())
        self._queue.append(waiting)
        self._waiting_rows += len(rows)
        if self._waiting_rows >= self._max_batch_rows:
            self._full.set()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        if self._timer is None:
            self._timer = loop.call_at(waiting.arrived + self._queue_timeout, self._expire)
        return waiting

    def _pop(self) -> _Waiting:
        """Take the oldest off the queue."""
        waiting = self._queue.popleft()
        self._waiting_rows -= len(waiting.rows)
        return waiting

    def _drop(self, waiting: _Waiting) -> None:
        """Nobody wants this answer any more: if the rows still wait, they never run."""
        if waiting in self._queue:
            self._queue.remove(waiting)
            self._waiting_rows -= len(waiting.rows)
        if not waiting.future.cancel() and not waiting.future.cancelled():
            waiting.future.exception()  # seen, so that asyncio does not report it as lost

    def _expire(self) -> None:
        """End what has waited too long, now, whatever the engine does; then sleep until the next one would."""
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._queue:
            due = self._queue[0].arrived + self._queue_timeout
            if due > loop.time():
                self._timer = loop.call_at(due, self._expire)
                return
            waiting = self._pop()
            if not waiting.future.done():
                reason = f"not started within {self._queue_timeout:g} s, as long as the queue allows"
                waiting.future.set_exception(QueueTimeoutError(reason))

    async def _work(self) -> None:
        """Run batches until nothing waits."""
        loop = asyncio.get_running_loop()
        while batch := await self._take():
            started = loop.time()
            try:
                rows = batch[0].rows if len(batch) == 1 else np.concatenate([waiting.rows for waiting in batch])
                answers = await loop.run_in_executor(self._executor, self._run, rows)
                if len(answers) != len(rows):
                    raise ValueError(f"the engine answered {len(rows)} rows with {len(answers)}")  # noqa: TRY301
            except Exception as error:  # noqa: BLE001  whatever it is, it fails this batch and no other
                failure = InternalError(error)
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(failure)
                continue
            self._seconds_per_row = (loop.time() - started) / len(rows)
            start = 0
            for waiting in batch:
                stop = start + len(waiting.rows)
                if not waiting.future.done():
                    waiting.future.set_result(answers[start:stop])
                start = stop
        self._worker = None

    async def _take(self) -> list[_Waiting]:
        """The requests of the next batch, oldest first, as many as fit; none when none wait."""
        if self._max_delay and self._queue and self._waiting_rows < self._max_batch_rows:
            self._full.clear()
            remaining = self._queue[0].arrived + self._max_delay - asyncio.get_running_loop().time()
            with suppress(TimeoutError):  # it has waited long enough
                await asyncio.wait_for(self._full.wait(), max(0.0, remaining))
        batch: list[_Waiting] = []
        room = self._max_batch_rows
        while self._queue and len(self._queue[0].rows) <= room:
            waiting = self._pop()
            if not waiting.future.done():  # it may have been cancelled a moment ago
                batch.append(waiting)
                room -= len(waiting.rows)
        return batch
