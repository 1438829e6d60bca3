"""OpenTelemetry traces: a span per call that continues the caller's trace, with child spans for the queue and the engine."""

import time

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


class Tracing:
    """Sends the spans of this process to a collector."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` speaks OTLP over gRPC: http://host:4317, or https."""
        self._provider = TracerProvider(resource=Resource.create({"service.name": "tercet"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("tercet")
        self._epoch = time.time() - time.perf_counter()  # seconds

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        """Opens a span for each call and makes it the current one."""
        return aio_server_interceptor(tracer_provider=self._provider)  # type: ignore[no-any-return, no-untyped-call]

    def record_batch(self, queued: float, started: float, ended: float) -> None:
        """Add the queue and compute spans of a request to the current call. Times are of time.perf_counter."""
        for name, start, end in (("queue", queued, started), ("compute", started, ended)):
            span = self._tracer.start_span(name, start_time=self._nanoseconds(start))
            span.end(self._nanoseconds(end))

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()

    def _nanoseconds(self, seconds: float) -> int:
        return int((self._epoch + seconds) * 1e9)
