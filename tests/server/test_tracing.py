"""Traces for a collector, and logs as JSON."""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from tercet.proto import fizzbuzz_pb2_grpc
from tercet.proto.fizzbuzz_pb2 import AnswerRequest

from tests.conftest import BIN, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

pytestmark = pytest.mark.slow


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives spans."""

    def __init__(self) -> None:
        self.spans: Queue[Any] = Queue()

    def Export(self, request: Any, _context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector and its address."""
    server, servicer = grpc.server(ThreadPoolExecutor(2)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_call_continues_its_callers_trace(workspace: Path, collector: tuple[Collector, str], workers: str) -> None:
    """The call's span is a child of the caller's; the time in the queue and in the engine are its children, one after the other."""
    servicer, endpoint = collector
    flags = ("--trace-endpoint", endpoint, "--workers", workers)
    with serving(workspace / "models", *flags) as service, grpc.insecure_channel(service.address) as channel:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
        fizzbuzz_pb2_grpc.FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]), metadata=metadata)
    spans = {span.name.rpartition("/")[2]: span for span in (servicer.spans.get(timeout=30) for _ in range(3))}
    call, queue, compute = spans["Answer"], spans["queue"], spans["compute"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert call.parent_span_id.hex() == PARENT
    assert queue.parent_span_id == compute.parent_span_id == call.span_id
    assert queue.start_time_unix_nano <= queue.end_time_unix_nano <= compute.start_time_unix_nano
    assert abs(queue.start_time_unix_nano - call.start_time_unix_nano) < 1e9


def test_log_lines_are_json(workspace: Path) -> None:
    """With --log-format json every line of stderr is one JSON object, from the parent and its workers."""
    command = [str(BIN / "tercet"), "serve", "--port", "0", "--models", str(workspace / "models"), "--log-format", "json"]
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        lines = process.communicate()[1].splitlines()
    found = [json.loads(line) for line in lines]
    assert {"tercet.server.engine", "tercet.server.workers"} <= {line["name"] for line in found}
    assert all(line["levelname"] and line["message"] for line in found)
