"""What a model has done in this process, counted as Triton counts it."""

import time
from collections import defaultdict
from dataclasses import dataclass, field

from tercet.server.batcher import Observer


@dataclass(slots=True)
class Duration:
    """How often something was done, and how many seconds it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """It was done `count` times, so many seconds each."""
        self.count += count
        self.seconds += seconds * count


@dataclass(slots=True)
class Statistics:
    """Counts and durations; told by the model's batcher, and tells `following`."""

    following: Observer | None = None
    rows: int = 0
    last: float = 0.0  # when the last batch ended, in seconds since the epoch
    success: Duration = field(default_factory=Duration)  # requests
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute: Duration = field(default_factory=Duration)  # requests, each with the time of its whole batch
    batches: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))  # by their rows

    def depth(self, rows: int) -> None:
        """So many rows wait now."""
        if self.following:
            self.following.depth(rows)

    def waited(self, seconds: float) -> None:
        """A request was in the queue for so long."""
        self.queue.add(seconds)
        if self.following:
            self.following.waited(seconds)

    def ran(self, rows: int, requests: int, seconds: float) -> None:
        """A batch of so many rows, of so many requests, kept the engine busy for so long."""
        self.rows += rows
        self.last = time.time()
        self.compute.add(seconds, requests)
        self.batches[rows].add(seconds)
        if self.following:
            self.following.ran(rows, requests, seconds)
