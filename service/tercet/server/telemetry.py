"""One recorder per process, always on, that Prometheus and ModelStatistics read; docs/metrics.md lists the metrics.

The values for Prometheus are in memory that the parent of several workers maps too. It adds them up over all workers, and hands the
memory of a dead worker on to its replacement: no count is lost, and none goes backwards.
"""

import logging
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from itertools import accumulate
from mmap import mmap
from typing import Any, NamedTuple

import msgspec

from tercet.errors import StartupError
from tercet.server.config import Config

MEMORY_BYTES, KEY_BYTES = 2**23, 2**20  # enough for thousands of models; pages take memory only once they are written to
VALUES = 20  # per metric and labels: first the counts of a histogram's buckets, last its sum; other metrics use only the first
SECONDS = [1e-4 * 2**i for i in range(18)]  # 0.1 ms to 13 s
ROWS = [float(2**i) for i in range(13)]  # 1 to 4,096
QUEUE_ROWS = "tercet_queue_rows"


class Metric(NamedTuple):
    """A metric of Prometheus: with `bounds` a histogram, with a name that ends in _total a counter, otherwise a gauge."""

    help: str
    labels: tuple[str, ...] = ()
    bounds: Sequence[float] = ()  # upper bounds of the buckets


METRICS = {
    "tercet_request_seconds": Metric("From request read to response made.", ("method",), SECONDS),
    "tercet_failures_total": Metric("Calls that ended with an error.", ("method", "code")),
    "tercet_queue_seconds": Metric("A request's time in the queue.", ("model",), SECONDS),
    "tercet_compute_seconds": Metric("A batch's time in the engine.", ("model",), SECONDS),
    "tercet_batch_rows": Metric("Rows of a batch.", ("model",), ROWS),
    QUEUE_ROWS: Metric("Rows that wait.", ("model",)),
    "tercet_reloads_total": Metric("New files of a model.", ("model", "result")),
    "tercet_worker_restarts_total": Metric("Workers that died and were replaced."),
    "tercet_build_info": Metric("Version and engine of the service.", ("version", "engine")),
}


class MetricMemory:
    """The metrics of one process: a line of JSON with name and labels for each, then in the same order VALUES float64 for each."""

    def __init__(self, file: int = -1) -> None:
        """Map the file with this descriptor, MEMORY_BYTES long, and go on counting from its values; -1: share with nobody."""
        self._memory = mmap(file, MEMORY_BYTES)
        self._numbers = memoryview(self._memory)[KEY_BYTES:].cast("d")
        self._memory.seek(len(self._lines()))
        self._values = dict(self.items())

    def values(self, *key: str) -> "memoryview[float]":
        """The values of a metric, given its name and labels."""
        if key not in self._values:
            self._memory.write(msgspec.json.encode(key))
            self._memory.write(b"\n")  # makes it visible to readers
            self._values = dict(self.items())
        return self._values[key]

    def items(self) -> Iterator[tuple[tuple[str, ...], "memoryview[float]"]]:
        """Name and labels, and values, of each metric."""
        for i, line in enumerate(self._lines().splitlines()):
            yield msgspec.json.decode(line, type=tuple[str, ...]), self._numbers[i * VALUES : (i + 1) * VALUES]

    def clear_gauges(self) -> None:
        """Forget the rows that waited in a process that has died."""
        for key, values in self.items():
            if key[0] == QUEUE_ROWS:
                values[0] = 0

    def _lines(self) -> bytes:
        return self._memory[: self._memory.rfind(b"\n", 0, self._memory.find(b"\0")) + 1]


def observe(histogram: "memoryview[float]", bounds: Sequence[float], value: float) -> None:
    """Count a value in its bucket, and add it to the sum."""
    histogram[bisect_left(bounds, value)] += 1
    histogram[VALUES - 1] += value


class Duration:
    """How often something was done, and how many seconds it took in total."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """It was done `count` times and took `seconds` each time."""
        self.count += count
        self.seconds += seconds * count


class ModelTelemetry:
    """What one model did in this process."""

    def __init__(self, memory: MetricMemory, name: str) -> None:
        self.success, self.fail, self.queue = Duration(), Duration(), Duration()  # requests
        self.compute = Duration()  # requests, each with the time of its whole batch
        self.batches: dict[int, Duration] = defaultdict(Duration)  # by their rows
        self.rows = 0
        self.last_inference = 0.0  # when the last batch ended, in seconds since the epoch
        self.request_succeeded, self.request_failed = self.success.add, self.fail.add  # with the seconds that it took
        self._queue_seconds, self._compute_seconds, self._batch_rows, self._queue_rows = (
            memory.values(f"tercet_{metric}", name) for metric in ("queue_seconds", "compute_seconds", "batch_rows", "queue_rows")
        )
        for result in ("served", "refused"):  # counted from 0 on, so that Prometheus sees the first reload as an increase
            memory.values("tercet_reloads_total", name, result)

    def queue_depth(self, rows: int) -> None:
        """So many rows wait now."""
        self._queue_rows[0] = rows

    def request_waited(self, seconds: float) -> None:
        """A request left the queue after this time."""
        self.queue.add(seconds)
        observe(self._queue_seconds, SECONDS, seconds)

    def batch_ran(self, rows: int, requests: int, seconds: float) -> None:
        """The engine was busy with a batch for this time."""
        self.rows += rows
        self.last_inference = time.time()
        self.compute.add(seconds, requests)
        self.batches[rows].add(seconds)
        observe(self._batch_rows, ROWS, rows)
        observe(self._compute_seconds, SECONDS, seconds)


class Telemetry:
    """What this process does. Use it from the event loop; a batcher may report to its ModelTelemetry from its thread."""

    def __init__(self, memory: MetricMemory | None = None) -> None:
        self.memory = memory or MetricMemory()
        self.model = cache(partial(ModelTelemetry, self.memory))  # by name

    def call_answered(self, method: str, seconds: float) -> None:
        """A call was answered, this long after its request had been read."""
        observe(self.memory.values("tercet_request_seconds", method), SECONDS, seconds)

    def call_failed(self, method: str, code: str) -> None:
        """A call ended with this gRPC status."""
        self.memory.values("tercet_failures_total", method, code)[0] += 1

    def model_reloaded(self, model: str, result: str) -> None:
        """New files of a model were `served` or `refused`."""
        self.memory.values("tercet_reloads_total", model, result)[0] += 1


class MetricsCollector:
    """Gives prometheus_client the sums of the metrics of several processes."""

    def __init__(self, memories: Sequence[MetricMemory]) -> None:
        self._memories = memories

    def collect(self) -> Iterator[Any]:
        from prometheus_client import core  # noqa: PLC0415  only with --metrics-port

        sums: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0] * VALUES)
        for memory in self._memories:
            for key, values in memory.items():
                sums[key] = [a + b for a, b in zip(sums[key], values, strict=True)]
        for name, metric in METRICS.items():
            kind = "Histogram" if metric.bounds else "Counter" if name.endswith("_total") else "Gauge"
            family = getattr(core, f"{kind}MetricFamily")(name, metric.help, labels=metric.labels)
            for (_, *labels), total in sorted(item for item in sums.items() if item[0][0] == name):
                buckets = list(zip([*map(str, metric.bounds), "+Inf"], accumulate(total), strict=False))
                family.add_metric(labels, *((buckets, total[-1]) if metric.bounds else (total[0],)))
            yield family


def start_metrics_server(config: Config, memories: Sequence[MetricMemory]) -> int:
    """Serve GET /metrics in a thread; return the port. Raises StartupError when it is taken."""
    from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415  only with --metrics-port

    memories[0].values("tercet_build_info", version("tercet"), config.engine)[0] = 1
    registry = CollectorRegistry()
    registry.register(MetricsCollector(memories))
    try:
        return start_http_server(config.metrics_port or 0, config.host, registry)[0].server_port
    except OSError as error:
        address, hint = f"{config.host}:{config.metrics_port}", "choose another with --metrics-port, or 0 for a free one"
        raise StartupError(f"metrics: cannot listen on {address}: {str(error.strerror).lower()}; {hint}") from error


def configure_logging(style: str) -> None:
    """Log to stderr from INFO on; `style` is human or json, in which an exception is a field instead of more lines."""
    formatter = logging.Formatter("%(levelname)s %(name)s %(process)d: %(message)s")
    if style == "json":
        from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415  only with --log-format json

        formatter = JsonFormatter("%(asctime)s %(levelname)s %(name)s %(process)d %(message)s", timestamp=True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
