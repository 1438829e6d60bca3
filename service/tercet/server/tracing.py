"""OpenTelemetry traces: a span per call that continues the caller's trace, with child spans for the queue and the engine."""

import time

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


class Tracing:
    """Sends the spans of this process to a collector."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` speaks OTLP over gRPC: http://host:4317, or https."""
        provider = TracerProvider(resource=Resource.create({"service.name": "tercet"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = provider.get_tracer("tercet")
        self._epoch = time.time() - time.perf_counter()  # seconds
        self.interceptor = aio_server_interceptor(tracer_provider=provider)  # type: ignore[no-untyped-call]
        self.close = provider.shutdown  # sends the remaining spans

    def record_batch(self, queued: float, started: float, ended: float) -> None:
        """Add the queue and compute spans of a request to the current call. Times are of time.perf_counter."""
        times = [int((self._epoch + seconds) * 1e9) for seconds in (queued, started, ended)]  # in nanoseconds
        for name, start, end in zip(("queue", "compute"), times, times[1:], strict=False):
            self._tracer.start_span(name, start_time=start).end(end)
