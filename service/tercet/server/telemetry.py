"""Adapter on metrics.py until the real telemetry is merged."""

import time
from collections import defaultdict
from dataclasses import dataclass

from tercet.server.metrics import Metrics


@dataclass(slots=True)
class Duration:
    """How often something was done, and how many seconds it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.seconds += seconds * count


class ModelTelemetry:
    """What one model has done in this process."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._observer = metrics.observer(name)
        self.rows, self.last_inference = 0, 0.0
        self.success, self.fail, self.queue, self.compute = Duration(), Duration(), Duration(), Duration()
        self.batches: dict[int, Duration] = defaultdict(Duration)

    def queue_depth(self, rows: int) -> None:
        if self._observer:
            self._observer.depth(rows)

    def request_waited(self, seconds: float) -> None:
        self.queue.add(seconds)
        if self._observer:
            self._observer.waited(seconds)

    def batch_ran(self, rows: int, requests: int, seconds: float) -> None:
        self.rows += rows
        self.last_inference = time.time()
        self.compute.add(seconds, requests)
        self.batches[rows].add(seconds)
        if self._observer:
            self._observer.ran(rows, requests, seconds)

    def request_succeeded(self, seconds: float) -> None:
        self.success.add(seconds)

    def request_failed(self, seconds: float) -> None:
        self.fail.add(seconds)


class Telemetry:
    """What this process has done."""

    def __init__(self, metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self.call_answered, self.call_failed = self._metrics.answered, self._metrics.failed
        self.model_reloaded = self._metrics.reloaded

    def model(self, name: str) -> ModelTelemetry:
        return ModelTelemetry(self._metrics, name)
