"""OpenTelemetry traces: a span for each call, continuing its caller's trace, and in it the time in the queue and in the engine."""

import time

import grpc
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


class Tracing:
    """Spans of this process, sent to a collector."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` speaks OTLP over gRPC: http://host:4317, or https."""
        self._provider = TracerProvider(resource=Resource.create({"service.name": "tercet"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("tercet")
        self._epoch = time.time() - time.perf_counter()  # seconds

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        """Opens a span for each call and makes it the current one."""
        made: grpc.aio.ServerInterceptor = aio_server_interceptor(tracer_provider=self._provider)  # type: ignore[no-untyped-call]
        return made

    def batch(self, put: float, began: float, ended: float) -> None:
        """A request of the current call was put into the queue, and its batch began and ended: seconds of time.perf_counter."""
        for name, start, stop in (("queue", put, began), ("compute", began, ended)):
            span = self._tracer.start_span(name, start_time=self._nanoseconds(start), kind=trace.SpanKind.INTERNAL)
            span.end(self._nanoseconds(stop))

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()

    def _nanoseconds(self, seconds: float) -> int:
        """Since the epoch."""
        return int((self._epoch + seconds) * 1e9)
