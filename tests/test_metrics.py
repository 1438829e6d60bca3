"""What Prometheus is told: it is counted right, whatever the number of workers."""

import os
import re
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from proto.inference_pb2 import RepositoryModelLoadRequest
from proto.inference_pb2_grpc import GRPCInferenceServiceStub
from service.client import Client
from tests.conftest import BIN, REPOSITORY, Service, run, serving

Scrape = Callable[[], dict[str, float]]


def scraper(service: Service) -> Scrape:
    """What the second line of a service's output leads to: every sample by its name and labels, as Prometheus writes them."""
    assert service.process.stdout is not None
    url = service.process.stdout.readline().split(" at ")[1].strip()

    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(url) as response:  # noqa: S310  our own
            families = text_string_to_metric_families(response.read().decode())
            samples = [sample for family in families for sample in family.samples]
        return {
            " ".join([name, *(f"{key}={value}" for key, value in sorted(labels.items()))]): v for name, labels, v, *_ in samples
        }

    return scrape


@pytest.mark.parametrize("workers", ["1", "2"])
def test_calls_and_failures_are_counted(workspace: Path, workers: str) -> None:
    """Requests, rows and batches add up, failures by their code, over all workers."""
    with serving(workspace / "models", "--metrics-port", "0", "--workers", workers) as service:
        scrape = scraper(service)
        for _ in range(6):
            with Client(service.address) as client:  # each connection may reach another worker
                client.answer([3, 5])
                client.infer("fizzbuzz", [1, 2, 3])
                with pytest.raises(grpc.RpcError):
                    client.answer([])
                with pytest.raises(grpc.RpcError):
                    client.infer("nosuch", [1])
        found = scrape()
    assert found["trefoil_request_seconds_count method=Answer"] == 6
    assert found["trefoil_request_seconds_count method=ModelInfer"] == 6
    assert found["trefoil_failures_total code=INVALID_ARGUMENT method=Answer"] == 6
    assert found["trefoil_failures_total code=NOT_FOUND method=ModelMetadata"] == 6
    assert found["trefoil_queue_seconds_count model=fizzbuzz"] == 12
    assert found["trefoil_batch_rows_count model=fizzbuzz"] == found["trefoil_compute_seconds_count model=fizzbuzz"] == 12
    assert found["trefoil_batch_rows_sum model=fizzbuzz"] == 30
    assert 0 < found["trefoil_compute_seconds_sum model=fizzbuzz"] < found["trefoil_request_seconds_sum method=Answer"] * 10
    assert found["trefoil_queue_rows model=fizzbuzz"] == 0


def test_a_dead_worker_leaves_its_counts(workspace: Path) -> None:
    """What a killed worker counted stays in the sums, and its replacement is counted."""
    with serving(workspace / "models", "--metrics-port", "0", "--workers", "2") as service:
        scrape = scraper(service)
        with Client(service.address) as client:
            client.answer([3])
        for worker in psutil.Process(service.process.pid).children():
            os.kill(worker.pid, signal.SIGKILL)
        while (found := scrape())["trefoil_worker_restarts_total"] < 2:
            pass
    assert found["trefoil_request_seconds_count method=Answer"] == 1


def test_every_metric_is_described(workspace: Path) -> None:
    """docs/metrics.md names what is told, and nothing else."""
    described = set(re.findall(r"^\| `(\w+)`", (REPOSITORY / "docs/metrics.md").read_text(), flags=re.MULTILINE))
    with serving(workspace / "models", "--metrics-port", "0", "--workers", "2") as service:
        scrape = scraper(service)
        with Client(service.address) as client:
            client.answer([3])
            with pytest.raises(grpc.RpcError):
                client.answer([])
        with grpc.insecure_channel(service.address) as channel:
            GRPCInferenceServiceStub(channel).RepositoryModelLoad(RepositoryModelLoadRequest(model_name="fizzbuzz"))
        told = {re.sub(r"_(count|sum|bucket|created)$", "", name.partition(" ")[0]) for name in scrape()}
    assert {name for name in told if name != "trefoil_worker_restarts"} == described


def test_a_taken_port_is_named(workspace: Path) -> None:
    """The service does not start without the metrics that it was told to give."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [str(BIN / "trefoil"), "serve", "--port", "0", "--metrics-port", port]
        ended = run(*command, cwd=workspace, check=False)
    assert ended.returncode == 1
    assert f"metrics: cannot listen on 127.0.0.1:{port}: address already in use; choose another" in ended.stdout
