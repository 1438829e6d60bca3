"""Several processes on one port: they answer, are replaced, and shut down."""

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tercet.card import Card, Rows, read_card
from tercet.client import OPTIONS
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.load import build_request
from tests.conftest import BIN, Service, run, serving

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
WORKERS = health_pb2.HealthCheckRequest(service="workers")

pytestmark = pytest.mark.slow


def connect(service: Service) -> grpc.Channel:
    """A channel with its own connection that retries what a dying worker did not answer."""
    channel = grpc.insecure_channel(service.address, [*OPTIONS.items(), ("grpc.use_local_subchannel_pool", 1)])
    grpc.channel_ready_future(channel).result(30)
    return channel


def until(condition: Callable[[], Any]) -> Any:
    """Poll until the condition is true; return its value."""
    deadline = monotonic() + 60
    while monotonic() < deadline:
        if found := condition():
            return found
    raise TimeoutError


def children(service: Service) -> list[psutil.Process]:
    """The running workers."""
    return [child for child in psutil.Process(service.process.pid).children() if runs(child)]


def runs(process: psutil.Process) -> bool:
    """Whether a process is running."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def connected(service: Service) -> list[psutil.Process]:
    """The workers that have a connection."""
    return [child for child in children(service) if any(c.status == "ESTABLISHED" for c in child.net_connections("tcp"))]


def healthy(service: Service) -> bool:
    """Whether health reports SERVING for `workers`, on a new channel."""
    with connect(service) as channel:
        return bool(health_pb2_grpc.HealthStub(channel).Check(WORKERS, timeout=30).status == SERVING)


def right(response: Any, card: Card) -> bool:
    """Whether a response to `build_request` has the outputs in the card."""
    answers: Rows = np.frombuffer(response.raw_output_contents[0], card.output.dtype).reshape(-1, *card.output.shape)
    expected = np.resize(np.array([example.output for example in card.examples]), answers.shape)
    return np.allclose(answers, expected, rtol=0, atol=1e-5)


@pytest.fixture
def pair(workspace: Path) -> Iterator[Service]:
    """A service with two workers."""
    with serving(workspace / "models", "--workers", "2") as service:
        yield service


@pytest.fixture
def card(workspace: Path) -> Card:
    """The slowest model."""
    return read_card(workspace / "models" / "mnist")


@pytest.fixture
def request_(card: Card) -> ModelInferRequest:
    """A request that takes a worker some time, and is larger than what gRPC buffers for retries by default."""
    return build_request(card, 512)


def test_two_processes_answer(pair: Service, card: Card, request_: ModelInferRequest) -> None:
    """There are two processes, and either gives the right answers."""
    channels: list[grpc.Channel] = []
    until(lambda: channels.append(connect(pair)) or len(connected(pair)) == 2)  # type: ignore[func-returns-value]
    assert len(children(pair)) == 2
    for channel in channels:
        with channel:
            assert right(GRPCInferenceServiceStub(channel).ModelInfer(request_), card)


def test_dead_worker_is_reported_and_replaced(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The other worker's health turns NOT_SERVING and SERVING again, the log has the reason, and there is a new process."""
    with serving(workspace / "models", "--workers", "2") as service, connect(service) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(WORKERS, timeout=60)
        assert SERVING in (answer.status for answer in watch)
        [survivor] = connected(service)
        [victim] = set(children(service)) - {survivor}
        victim.kill()
        assert [next(watch).status for _ in range(2)] == [NOT_SERVING, SERVING]
        assert len(children(service)) == 2
        assert survivor in children(service)
        watch.cancel()
    assert f"(process {victim.pid}) ended with -9; replacing it" in capfd.readouterr().err


def test_calls_to_a_dying_worker_are_retried(pair: Service, card: Card, request_: ModelInferRequest) -> None:
    """Calls in flight to a killed worker are answered by another one, through gRPC's retry policy."""
    with connect(pair) as channel:
        [victim] = connected(pair)
        calls = [GRPCInferenceServiceStub(channel).ModelInfer.future(request_, timeout=60) for _ in range(32)]
        calls[0].result()
        victim.kill()
        in_flight = sum(not call.done() for call in calls)
        assert all(right(call.result(), card) for call in calls)
    assert in_flight
    until(lambda: len(children(pair)) == 2 and healthy(pair))


def test_sigterm_loses_nothing(workspace: Path, card: Card, request_: ModelInferRequest) -> None:
    """The calls that both workers have in flight at SIGTERM are answered, and the exit code is 0."""
    channels: list[grpc.Channel] = []
    with serving(workspace / "models", "--workers", "2") as service:
        until(lambda: channels.append(connect(service)) or len(connected(service)) == 2)  # type: ignore[func-returns-value]
        workers = children(service)
        calls = [GRPCInferenceServiceStub(channel).ModelInfer.future(request_) for channel in channels for _ in range(6)]
        answered = threading.Semaphore(0)
        for call in calls:
            call.add_done_callback(lambda _: answered.release())
        for _ in range(len(calls) // 2):  # by then grpc.aio has handed the others to their servicer, too
            assert answered.acquire(timeout=60)
        service.process.send_signal(signal.SIGTERM)
        in_flight = sum(not call.done() for call in calls)
        assert all(right(call.result(), card) for call in calls)
        assert service.process.wait(60) == 0
    assert in_flight
    assert not any(worker.is_running() for worker in workers)
    for channel in channels:
        channel.close()


def test_orphans_end(workspace: Path) -> None:
    """Workers whose parent was killed shut down."""
    command = [str(BIN / "tercet"), "serve", "--port", "0", "--models", str(workspace / "models"), "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert " at " in process.stdout.readline()
        workers = psutil.Process(process.pid).children()
        process.kill()
    assert len(workers) == 2
    until(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers))


def test_sigterm_while_workers_start(workspace: Path) -> None:
    """A SIGTERM at any time while dead workers are being replaced ends all processes, with exit code 0."""
    for _ in range(3):
        with serving(workspace / "models", "--workers", "2") as service:
            for worker in (workers := children(service)):
                worker.kill()
            gone = {worker.pid for worker in workers}
            until(lambda gone=gone: not {child.pid for child in children(service)} & gone)  # type: ignore[misc]


@pytest.mark.parametrize("shared", [False, True])
def test_port_in_use(workspace: Path, *, shared: bool) -> None:
    """A port on which another program listens, even one that would share it, is refused in one sentence."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=shared) as taken:
        port = taken.getsockname()[1]
        flags = ("--workers", "2", "--models", str(workspace / "models"), "--port", str(port))
        done = run(str(BIN / "tercet"), "serve", *flags, cwd=workspace, check=False)
    message = f"tercet: cannot listen on 127.0.0.1:{port}: Address already in use; choose another port with --port"
    assert (done.returncode, done.stdout.splitlines()) == (1, [message])


def test_damaged_model(workspace: Path, tmp_path: Path) -> None:
    """A damaged model is refused in one sentence that names the file, not in one per worker."""
    shutil.copytree(workspace / "models" / "fizzbuzz", tmp_path / "fizzbuzz")
    os.truncate(tmp_path / "fizzbuzz" / "model.onnx", 9)
    flags = ("--workers", "2", "--models", str(tmp_path), "--port", "0")
    done = run(str(BIN / "tercet"), "serve", *flags, cwd=tmp_path, check=False)
    [message] = done.stdout.splitlines()
    assert done.returncode == 1
    assert message.startswith(f"tercet: {tmp_path}/fizzbuzz/model.onnx is not the file that its card.json describes")


def test_working_directory_is_not_imported(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers do not import modules from the working directory."""
    (tmp_path / "tercet.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with serving(workspace / "models", "--workers", "2") as service:
        assert len(children(service)) == 2
