"""The server as a whole: how it starts, what it offers, how it ends."""

import secrets
import signal
import socket
import threading
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tercet.card import Card
from tercet.client import Client
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server.app import SERVICE_NAMES

import models
from tests.conftest import BIN, serving
from tests.server.support import MOST, SERVING, answer, count, reflect, refusal, refused

pytestmark = pytest.mark.slow


def test_health(channel: grpc.Channel) -> None:
    """Health knows every model by its name, and all of them by none."""
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", *models.names()):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        stub.Check(health_pb2.HealthCheckRequest(service="nope"))


def test_reflection(channel: grpc.Channel) -> None:
    """Reflection lists every service, describes its methods, and a message down to its fields."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    assert sorted(database.get_services()) == sorted(SERVICE_NAMES)
    for name in SERVICE_NAMES:
        assert pool.FindServiceByName(name).methods
    found = pool.FindMessageTypeByName("inference.ModelInferRequest")
    assert found.fields_by_name.keys() == ModelInferRequest.DESCRIPTOR.fields_by_name.keys()


def test_sigterm_loses_nothing(workspace: Path, cards: dict[str, Card]) -> None:
    """What is in flight when SIGTERM comes is answered; a call is refused only if it was never accepted; the exit code is 0."""
    card = cards["mnist"]
    rows = np.resize(card.example_rows(), (512, *card.input.shape))
    request = ModelInferRequest(model_name="mnist", raw_input_contents=[rows.tobytes()])
    request.inputs.add(name=card.input.name, datatype=card.input.datatype, shape=rows.shape)
    first = threading.Event()
    with serving(workspace / "models") as service, grpc.insecure_channel(service.address) as channel:
        calls = [GRPCInferenceServiceStub(channel).ModelInfer.future(request) for _ in range(32)]
        for call in calls:
            call.add_done_callback(lambda _: first.set())
        assert first.wait(60)
        service.process.send_signal(signal.SIGTERM)
        before = sum(call.done() for call in calls)
        errors = [error for error in (call.exception() for call in calls) if error]
        assert service.process.wait(60) == 0
    assert before < len(calls) - len(errors)
    for error in errors:
        assert isinstance(error, grpc.Call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "failed to connect" in error.details()  # it never came to the service


def test_token(workspace: Path, tmp_path: Path) -> None:
    """With --token-file every call but health needs the token; a wrong one is as good as none."""
    token = secrets.token_hex()
    (tmp_path / "token").write_text(f"{token}\n")
    with serving(workspace / "models", "--token-file", str(tmp_path / "token")) as service:
        with grpc.insecure_channel(service.address) as channel:
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == SERVING
            for call in (answer(1), count(1, 2, 1), reflect):
                error = refused(partial(call, channel))
                assert error.code() == StatusCode.UNAUTHENTICATED
                assert "authorization: Bearer" in error.details()
        for wrong in (token[:-1], f"{token}s", ""):
            with Client(service.address, token=wrong) as client:
                assert refused(partial(client.infer, "fizzbuzz", [1])).code() == StatusCode.UNAUTHENTICATED
        with Client(service.address, token=token) as client:
            assert client.answer([3]) == [word for _, word in client.count(3, 3)] == ["fizz"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--models", "nowhere"], "nowhere is not a folder"),
        (["--port", "70000"], "use 0 to 65535"),
        (["--port", "x"], "'x' is not a valid integer"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid:0"),
        (["--engine", "nope"], "use onnxruntime or torch"),
        (["--device", "nope"], "use auto or cpu or cuda"),
        (["--threads", "0"], "use 1 to"),
        (["--max-queue-rows", "1"], f"use {MOST} or more"),
        (["--max-message-bytes", str(2**31)], "use 1 to"),
        (["--queue-timeout", "nan"], "use 0.001 or more"),
        (["--max-delay", "-1"], "use 0 or more"),
        (["--token-file", "nowhere"], "nowhere cannot be read"),
        (["--token-file", "/dev/null"], "/dev/null is empty"),
        (["--token-file", str(BIN / "python")], "cannot be read"),
        (["--nope"], "No such option '--nope'"),
    ],
)
def test_wrong_flags(workspace: Path, flags: list[str], text: str) -> None:
    """A flag or value that cannot be is refused in one sentence that says what can."""
    assert text in refusal("--models", str(workspace / "models"), "--port", "0", *flags)


def test_wrong_environment() -> None:
    """A value from the environment is refused as a flag is, and the sentence names the variable."""
    assert "env var: 'TERCET_PORT'" in refusal(TERCET_PORT="x")


def test_port_in_use(workspace: Path) -> None:
    """A port that is taken is named, with what to do, and the exit code is not 0."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("--models", str(workspace / "models"), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in said
    assert "--port" in said
