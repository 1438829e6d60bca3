"""What a process counts, and what Prometheus gets with any number of workers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import grpc
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from tercet.client import Client
from tercet.server.telemetry import SLOT, MetricMemory, MetricsCollector, Telemetry

from tests.conftest import BIN, REPOSITORY, Service, run, serving

Scrape = Callable[[], dict[str, float]]


def collected(memories: Sequence[MetricMemory]) -> CollectorRegistry:
    """What Prometheus gets from several processes."""
    registry = CollectorRegistry()
    registry.register(MetricsCollector(memories))
    return registry


def test_model_statistics() -> None:
    """A model's recorder counts requests, rows and batches with their times, and there is one recorder per model."""
    telemetry = Telemetry()
    model = telemetry.model("fizzbuzz")
    model.request_waited(0.25)
    model.batch_ran(3, 2, 0.5)
    model.batch_ran(1, 1, 0.5)
    model.request_succeeded(1.0)
    model.request_failed(2.0)
    assert telemetry.model("fizzbuzz") is model
    durations = (model.success, model.fail, model.queue, model.compute, model.batches[3], model.batches[1])
    assert [(each.count, each.seconds) for each in durations] == [(1, 1.0), (1, 2.0), (1, 0.25), (3, 1.5), (1, 0.5), (1, 0.5)]
    assert model.last_inference > 0


def test_buckets() -> None:
    """A value is in the first bucket whose bound it does not exceed; one above all bounds only in +Inf."""
    telemetry = Telemetry()
    for rows in (1, 2, 3, 4096, 4097):
        telemetry.model("mnist").batch_ran(rows, 1, 0.0)
    registry = collected([telemetry.memory])
    expected = {"1.0": 1, "2.0": 2, "4.0": 3, "2048.0": 3, "4096.0": 4, "+Inf": 5}
    samples = {bound: registry.get_sample_value("tercet_batch_rows_bucket", {"model": "mnist", "le": bound}) for bound in expected}
    assert samples == expected
    assert registry.get_sample_value("tercet_batch_rows_sum", {"model": "mnist"}) == 8199


def test_a_replacement_goes_on_counting() -> None:
    """The memory of a process that died has its counts and none of its waiting rows; the next process adds to it."""
    with TemporaryFile() as first, TemporaryFile() as second:
        parent = [MetricMemory(file.fileno()) for file in (first, second)]
        for file, calls in ((first, 2), (second, 3), (first, 4)):
            worker = Telemetry(MetricMemory(file.fileno()))
            worker.model("mnist").queue_depth(7)
            for _ in range(calls):
                worker.call_failed("Answer", "NOT_FOUND")
            worker.call_answered(f"of {calls}", 1.0)
        parent[1].clear_gauges()
        registry = collected(parent)
        assert registry.get_sample_value("tercet_failures_total", {"method": "Answer", "code": "NOT_FOUND"}) == 9
        assert registry.get_sample_value("tercet_queue_rows", {"model": "mnist"}) == 7
        counts = [registry.get_sample_value("tercet_request_seconds_count", {"method": f"of {calls}"}) for calls in (2, 3, 4)]
        assert counts == [1, 1, 1]


def test_a_partial_key_is_overwritten() -> None:
    """A key that a process had written in part when it died is not a metric, and the next one replaces it."""
    with TemporaryFile() as file:
        memory = MetricMemory(file.fileno())
        memory.values("tercet_failures_total", "Answer", "NOT_FOUND")[0] = 1
        file.seek(SLOT.itemsize + SLOT.fields["key"][1])  # type: ignore[index]
        file.write(b'["tercet_failures_total","Assess","INVALID_ARG')
        file.flush()
        again = MetricMemory(file.fileno())
        again.values("tercet_queue_rows", "mnist")[0] = 5
        samples = {key: values[0] for key, values in memory.items()}
    assert samples == {("tercet_failures_total", "Answer", "NOT_FOUND"): 1, ("tercet_queue_rows", "mnist"): 5}


def scraper(service: Service) -> Scrape:
    """Read the address of the metrics from a service's output. Returns a function that gets all samples by name and labels."""
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


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_calls_and_failures_are_counted(workspace: Path, workers: str) -> None:
    """Requests, rows, batches and failures by code add up over all workers."""
    with serving(workspace / "models", "--metrics-port", "0", "--workers", workers) as service:
        scrape = scraper(service)
        for _ in range(6):
            with Client(service.address) as client:  # a connection may reach either worker
                client.answer([3, 5])
                client.infer("fizzbuzz", [1, 2, 3])
                with pytest.raises(grpc.RpcError):
                    client.answer([])
                with pytest.raises(grpc.RpcError):
                    client.infer("nosuch", [1])
        samples = scrape()
    assert samples["tercet_request_seconds_count method=Answer"] == 6
    assert samples["tercet_request_seconds_count method=ModelInfer"] == 6
    assert samples["tercet_failures_total code=INVALID_ARGUMENT method=Answer"] == 6
    assert samples["tercet_failures_total code=NOT_FOUND method=ModelConfig"] == 6
    assert samples["tercet_queue_seconds_count model=fizzbuzz"] == 12
    assert samples["tercet_batch_rows_count model=fizzbuzz"] == samples["tercet_compute_seconds_count model=fizzbuzz"] == 12
    assert samples["tercet_batch_rows_sum model=fizzbuzz"] == 30
    assert 0 < samples["tercet_compute_seconds_sum model=fizzbuzz"] < samples["tercet_request_seconds_sum method=Answer"] * 10
    assert samples["tercet_queue_rows model=fizzbuzz"] == 0


@pytest.mark.slow
def test_a_dead_worker_leaves_its_counts(workspace: Path) -> None:
    """The counts of a killed worker stay in the sums, and its replacement is counted."""
    with serving(workspace / "models", "--metrics-port", "0", "--workers", "2") as service:
        scrape = scraper(service)
        with Client(service.address) as client:
            client.answer([3])
        for worker in psutil.Process(service.process.pid).children():
            os.kill(worker.pid, signal.SIGKILL)
        while (samples := scrape())["tercet_worker_restarts_total"] < 2:
            pass
    assert samples["tercet_request_seconds_count method=Answer"] == 1


@pytest.mark.slow
def test_every_metric_is_described(workspace: Path) -> None:
    """docs/metrics.md names every metric, and no other."""
    described = set(re.findall(r"^\| `(\w+)`", (REPOSITORY / "docs/metrics.md").read_text(), flags=re.MULTILINE))
    with serving(workspace / "models", "--metrics-port", "0", "--workers", "2") as service:
        scrape = scraper(service)
        with Client(service.address) as client:
            client.answer([3])
            with pytest.raises(grpc.RpcError):
                client.answer([])
        exposed = {re.sub(r"_(count|sum|bucket|created)$", "", name.partition(" ")[0]) for name in scrape()}
    assert {name for name in exposed if name != "tercet_worker_restarts"} == described


@pytest.mark.slow
def test_a_taken_port_is_named(workspace: Path) -> None:
    """A metrics port in use is an error at startup that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [str(BIN / "tercet"), "serve", "--port", "0", "--metrics-port", port]
        ended = run(*command, cwd=workspace, check=False)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another port with --metrics-port" in ended.stdout


def expressions() -> list[str]:
    """The queries of the Grafana dashboard, and of the rule that the Kubernetes autoscaler needs."""
    dashboard = json.loads((REPOSITORY / "docs/grafana-dashboard.json").read_text())
    rules = yaml.safe_load((REPOSITORY / "deploy/kubernetes/monitoring/adapter-values.yaml").read_text())["rules"]["custom"]
    for_autoscaler = [
        re.sub("<<.LabelMatchers>>", 'pod="a"', re.sub("<<.GroupBy>>", "pod", rule["metricsQuery"])) for rule in rules
    ]
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + for_autoscaler


def test_the_dashboard_shows_every_metric() -> None:
    """The queries use every metric in docs/metrics.md, and no other."""
    described = set(re.findall(r"^\| `(\w+)`", (REPOSITORY / "docs/metrics.md").read_text(), flags=re.MULTILINE))
    shown = {re.sub(r"_(count|sum|bucket)$", "", name) for query in expressions() for name in re.findall(r"tercet_\w+", query)}
    assert shown == described


def test_promtool_accepts_every_query(tmp_path: Path) -> None:
    """Prometheus accepts every query."""
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    queries = [query.replace("$__rate_interval", "1m") for query in expressions()]
    rules = [{"record": f"query_{index}", "expr": query} for index, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert (
        f"SUCCESS: {len(rules)} rules found" in run(promtool, "check", "rules", str(tmp_path / "rules.yaml"), cwd=tmp_path).stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_promtool_accepts_the_metrics(workspace: Path, workers: str) -> None:
    """The metrics are well formed and named as Prometheus recommends."""
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    with serving(workspace / "models", "--metrics-port", "0", "--workers", workers) as service:
        assert service.process.stdout is not None
        url = service.process.stdout.readline().split(" at ")[1].strip()
        with Client(service.address) as client:
            client.answer([3])
            with pytest.raises(grpc.RpcError):
                client.infer("nosuch", [1])
        with urllib.request.urlopen(url) as response:  # noqa: S310  our own
            exposed = response.read().decode()
    done = subprocess.run([promtool, "check", "metrics"], input=exposed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
