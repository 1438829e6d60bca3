"""What the service tells of itself to Prometheus; docs/metrics.md says what each metric means.

With several workers each writes into files of its own, in a folder that the parent made (prometheus_client's multiprocess mode),
and the parent tells the sums.
"""

from functools import cache, partial
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from tercet.errors import StartupError
from tercet.server.config import Config

SECONDS = [1e-4 * 2**i for i in range(18)]  # upper bounds of the buckets: 0.1 ms to 13 s
ROWS = [2**i for i in range(13)]  # 1 to 4,096


class Metrics:
    """Where the parts of a service write down what they do. This one forgets it: metrics are off."""

    def answered(self, method: str, seconds: float) -> None:
        """A call was answered, so many seconds after its request had been read."""

    def failed(self, method: str, code: str) -> None:
        """A call ended with an error."""

    def reloaded(self, model: str, result: str) -> None:
        """New files of a model were `served` or `refused`."""

    def observer(self, model: str) -> "Observer | None":
        """Where a model's batcher writes."""


class Observer:
    """Where one model's batcher writes down what it does."""

    def __init__(self, waited: Histogram, ran: Histogram, rows: Histogram, depth: Gauge) -> None:
        self.waited = waited.observe  # seconds that one request was in the queue
        self.depth = depth.set  # rows that wait
        self._ran, self._rows = ran.observe, rows.observe

    def ran(self, rows: int, _requests: int, seconds: float) -> None:
        """A batch of so many rows kept the engine busy for so many seconds."""
        self._rows(rows)
        self._ran(seconds)


class Prometheus(Metrics):
    """Metrics that are kept, for `tell` or, in a worker, for the parent's `Sum`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        seconds = partial(Histogram, registry=registry, buckets=SECONDS)
        self._calls = seconds("tercet_request_seconds", "From request read to response made.", ["method"])
        self._waited = seconds("tercet_queue_seconds", "A request's time in the queue.", ["model"])
        self._ran = seconds("tercet_compute_seconds", "A batch's time in the engine.", ["model"])
        self._rows = Histogram("tercet_batch_rows", "Rows of a batch.", ["model"], registry=registry, buckets=ROWS)
        self._depth = Gauge("tercet_queue_rows", "Rows that wait.", ["model"], registry=registry, multiprocess_mode="livesum")
        self._failures = Counter("tercet_failures_total", "Calls that ended with an error.", ["method", "code"], registry=registry)
        self._reloads = Counter("tercet_reloads_total", "New files of a model.", ["model", "result"], registry=registry)
        self._call = cache(self._calls.labels)  # a label costs as much as an observation

    def answered(self, method: str, seconds: float) -> None:
        """A call was answered, so many seconds after its request had been read."""
        self._call(method).observe(seconds)

    def failed(self, method: str, code: str) -> None:
        """A call ended with an error."""
        self._failures.labels(method, code).inc()

    def reloaded(self, model: str, result: str) -> None:
        """New files of a model were `served` or `refused`."""
        self._reloads.labels(model, result).inc()

    def observer(self, model: str) -> Observer:
        """Where a model's batcher writes. Its reloads begin at 0, so that Prometheus sees the first one as an increase."""
        for result in ("served", "refused"):
            self._reloads.labels(model, result)
        return Observer(*(metric.labels(model) for metric in (self._waited, self._ran, self._rows, self._depth)))  # type: ignore[arg-type]


class Sum:
    """The parent's view: what all workers have written into a folder, and how often one was replaced."""

    def __init__(self, folder: str) -> None:
        self.registry = CollectorRegistry()
        self._folder = folder
        MultiProcessCollector(self.registry, path=folder)  # type: ignore[no-untyped-call]
        self.restarts = Counter("tercet_worker_restarts_total", "Workers that died and were replaced.", registry=self.registry)

    def bury(self, process: int) -> None:
        """A worker has died: what it counted stays, what it had waiting goes."""
        self.restarts.inc()
        mark_process_dead(process, self._folder)  # type: ignore[no-untyped-call]


def tell(registry: CollectorRegistry, config: Config) -> int:
    """Answer GET /metrics in a thread; return the port. Raises StartupError when it is taken."""
    Info("tercet_build", "What runs.", registry=registry).info({"version": version("tercet"), "engine": config.engine})
    try:
        server, _ = start_http_server(config.metrics_port or 0, config.host, registry)
    except OSError as error:
        reason = str(error.strerror).lower()
        advice = "choose another with --metrics-port, or 0 for a free one"
        raise StartupError(f"metrics: cannot listen on {config.host}:{config.metrics_port}: {reason}; {advice}") from error
    return server.server_port
