"""One recorder per process, always on, that Prometheus and ModelStatistics read; docs/metrics.md lists the metrics.

The values for Prometheus are in memory that the parent of several workers maps too. It adds them up over all workers, and hands the
memory of a dead worker on to its replacement: no count is lost, and none goes backwards.
"""

import logging
import os
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import takewhile
from mmap import mmap
from operator import itemgetter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tercet.errors import StartupError
from tercet.server.config import Config

SECONDS = [1e-4 * 2**i for i in range(18)]  # 0.1 ms to 13 s
ROWS = [float(2**i) for i in range(13)]  # 1 to 4,096
QUEUE_ROWS = "tercet_queue_rows"
METRICS: dict[str, tuple[str, tuple[str, ...], Sequence[float]]] = {  # help text, labels, upper bounds of a histogram's buckets
    "tercet_request_seconds": ("From request read to response made.", ("method",), SECONDS),
    "tercet_failures_total": ("Calls that ended with an error.", ("method", "code"), ()),
    "tercet_queue_seconds": ("A request's time in the queue.", ("model",), SECONDS),
    "tercet_compute_seconds": ("A batch's time in the engine.", ("model",), SECONDS),
    "tercet_batch_rows": ("Rows of a batch.", ("model",), ROWS),
    QUEUE_ROWS: ("Rows that wait.", ("model",), ()),
    "tercet_reloads_total": ("New files of a model.", ("model", "result"), ()),
    "tercet_worker_restarts_total": ("Workers that died and were replaced.", (), ()),
    "tercet_build_info": ("Version and engine of the service.", ("version", "engine"), ()),
}
# The name and labels of a metric as JSON, and its values: a histogram has the counts of its buckets and last its sum, others one.
SLOT = np.dtype([("used", "?"), ("key", "S511"), ("values", np.float64, len(SECONDS) + 2)])
SLOTS = 2**13  # enough for a thousand models; pages take memory only once they are written to


class MetricMemory:
    """The metrics of one process, in one SLOT each."""

    def __init__(self, file: int = -1) -> None:
        """Use the file with this descriptor, and continue from the counts in it; -1: share with nobody."""
        if file != -1:
            os.ftruncate(file, SLOTS * SLOT.itemsize)
        self._slots = np.frombuffer(mmap(file, SLOTS * SLOT.itemsize), SLOT)
        self.values = cache(self._find_or_add)  # by name and labels

    def _find_or_add(self, *key: str) -> "memoryview[float]":
        encoded = msgspec.json.encode(key)
        slot = next(slot for slot in self._slots if not slot["used"] or slot["key"] == encoded)
        slot["key"], slot["used"] = encoded, True  # in this order: a reader sees no part of a key
        return slot["values"].data  # type: ignore[no-any-return]

    def items(self) -> Iterator[tuple[tuple[str, ...], npt.NDArray[np.float64]]]:
        """Name and labels, and values, of each metric."""
        for slot in takewhile(itemgetter("used"), self._slots):
            yield msgspec.json.decode(slot["key"], type=tuple[str, ...]), slot["values"]

    def clear_gauges(self) -> None:
        """Forget the rows that waited in a process that has died."""
        for (name, *_), values in self.items():
            if name == QUEUE_ROWS:
                values[0] = 0


def observe(histogram: "memoryview[float]", bounds: Sequence[float], value: float) -> None:
    """Count a value in its bucket, and add it to the sum."""
    histogram[bisect_left(bounds, value)] += 1
    histogram[-1] += value


@dataclass(slots=True)
class Duration:
    """How often something was done, and how many seconds it took in total."""

    count: int = 0
    seconds: float = 0.0

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
        self.last_inference = 0.0  # when the last batch ended, in seconds since the epoch
        self.request_succeeded, self.request_failed = self.success.add, self.fail.add  # with the seconds that it took
        self._queue_seconds, self._compute_seconds, self._batch_rows, self._queue_rows = (
            memory.values(f"tercet_{metric}", name) for metric in ("queue_seconds", "compute_seconds", "batch_rows", "queue_rows")
        )
        for result in ("served", "refused"):  # counted from 0 on, so that Prometheus sees the first reload as an increase
            memory.values("tercet_reloads_total", name, result)

    def queue_depth(self, rows: int) -> None:
        self._queue_rows[0] = rows

    def request_waited(self, seconds: float) -> None:
        self.queue.add(seconds)
        observe(self._queue_seconds, SECONDS, seconds)

    def batch_ran(self, rows: int, requests: int, seconds: float) -> None:
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
        observe(self.memory.values("tercet_request_seconds", method), SECONDS, seconds)

    def call_failed(self, method: str, code: str) -> None:
        self.memory.values("tercet_failures_total", method, code)[0] += 1

    def model_reloaded(self, model: str, result: str) -> None:
        """New files of a model were `served` or `refused`."""
        self.memory.values("tercet_reloads_total", model, result)[0] += 1


@dataclass(eq=False)
class MetricsCollector:
    """Gives prometheus_client the sums of the metrics of several processes."""

    memories: Sequence[MetricMemory]

    def collect(self) -> Iterator[Any]:
        from prometheus_client import core  # noqa: PLC0415  only with --metrics-port

        sums: dict[tuple[str, ...], Any] = defaultdict(float)
        for memory in self.memories:
            for key, values in memory.items():
                sums[key] = sums[key] + values
        for name, (text, label_names, bounds) in METRICS.items():
            kind = "Histogram" if bounds else "Counter" if name.endswith("_total") else "Gauge"
            family = getattr(core, f"{kind}MetricFamily")(name, text, labels=label_names)
            for (_, *labels), total in sorted((item for item in sums.items() if item[0][0] == name), key=itemgetter(0)):
                buckets = list(zip([*map(str, bounds), "+Inf"], total.cumsum(), strict=False))
                family.add_metric(labels, *((buckets, total[-1]) if bounds else (total[0],)))
            yield family


def start_metrics_server(config: Config, memories: Sequence[MetricMemory]) -> Config:
    """Serve GET /metrics if --metrics-port is set; return the config with the actual port. Raises StartupError when it is taken."""
    if config.metrics_port is None:
        return config
    from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415  only with --metrics-port

    memories[0].values("tercet_build_info", version("tercet"), config.engine)[0] = 1
    registry = CollectorRegistry()
    registry.register(MetricsCollector(memories))
    try:
        server, _ = start_http_server(config.metrics_port, config.host, registry)
    except OSError as error:
        address = f"{config.host}:{config.metrics_port}"
        raise StartupError(f"cannot listen on {address}: {error.strerror}; choose another port with --metrics-port") from error
    return replace(config, metrics_port=server.server_port)


def configure_logging(style: str) -> None:
    """Log to stderr from INFO on; `style` is human or json, in which an exception is a field instead of more lines."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(process)d: %(message)s")
    if style == "json":
        from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415  only with --log-format json

        fields = "%(asctime)s %(levelname)s %(name)s %(process)d %(message)s"
        logging.root.handlers[0].setFormatter(JsonFormatter(fields, timestamp=True))
