"""The server as a whole: startup, standard services, limits of a connection, shutdown."""

import asyncio
import os
import secrets
import signal
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tercet.card import Card
from tercet.client import Client
from tercet.proto.fizzbuzz_pb2 import AnswerRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelInferRequest, ServerMetadataRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server import app

import models
from tests.conftest import BIN, run, serving
from tests.server.support import MOST, SERVING, HeldEngine, Visits, answer, count, inside, reflect, refusal, refused

pytestmark = pytest.mark.slow

SERVICE_NAMES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
    *("tercet.v1.Diabetes", "tercet.v1.Digits", "tercet.v1.FizzBuzz"),
]


def test_health(channel: grpc.Channel) -> None:
    """Health reports each model under its name, and all of them under the empty name."""
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", *models.names()):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        stub.Check(health_pb2.HealthCheckRequest(service="nope"))


def test_reflection(channel: grpc.Channel) -> None:
    """Reflection lists every service, describes its methods, and a message down to its fields."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    assert sorted(database.get_services()) == SERVICE_NAMES
    for name in SERVICE_NAMES:
        assert pool.FindServiceByName(name).methods
    message = pool.FindMessageTypeByName("inference.ModelInferRequest")
    assert message.fields_by_name.keys() == ModelInferRequest.DESCRIPTOR.fields_by_name.keys()


def test_sigterm_loses_nothing(workspace: Path, cards: dict[str, Card]) -> None:
    """Calls in flight at SIGTERM are answered; a call is refused only if it was never accepted; the exit code is 0."""
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
    """With --token-file every call except health needs the token; a wrong one is refused like none."""
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
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--port", "x"], "'x' is not a valid integer"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid:0"),
        (["--engine", "nope"], "'nope' is not one of 'onnxruntime', 'torch'"),
        (["--device", "nope"], "'nope' is not one of 'auto', 'cpu', 'cuda'"),
        (["--threads", "0"], "--threads must be between 1 and 1024, got 0"),
        (["--max-queue-rows", "1"], f"must be at least --max-request-rows, {MOST}, got 1"),
        (["--max-message-bytes", str(2**31)], "must be between 1 and"),
        (["--queue-timeout", "nan"], "must be 0.001 or more"),
        (["--max-delay", "-1"], "must be 0 or more"),
        (["--token-file", "nowhere"], "nowhere cannot be read"),
        (["--token-file", "/dev/null"], "/dev/null must have one token per line"),
        (["--token-file", str(BIN / "python")], "each of printable ASCII characters"),
        (["--nope"], "No such option '--nope'"),
    ],
)
def test_wrong_flags(workspace: Path, flags: list[str], text: str) -> None:
    """A wrong flag or value is refused in one sentence that says what is accepted."""
    assert text in refusal("--models", str(workspace / "models"), "--port", "0", *flags)


def test_wrong_environment() -> None:
    """A wrong value in the environment is refused like a flag, and the message names the variable."""
    assert "env var: 'TERCET_PORT'" in refusal(TERCET_PORT="x")


def test_port_in_use(workspace: Path) -> None:
    """The message for a port in use names it and says what to do; the exit code is not 0."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        output = refusal("--models", str(workspace / "models"), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in output
    assert "--port" in output


@asynccontextmanager
async def limited(folder: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], **settings: Any) -> AsyncIterator[Any]:
    """A server whose connections have these limits, and its address."""
    assert limits.keys() <= app.CONNECTION_OPTIONS.keys()  # the options exist
    monkeypatch.setattr("tercet.server.app.CONNECTION_OPTIONS", {**app.CONNECTION_OPTIONS, **limits})
    async with inside(folder, **settings) as (server, _):
        yield server.config.address


def listen(address: str) -> socket.socket:
    """A connection without a client behind it."""
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=60)


def read_all(connection: socket.socket) -> bytes:
    """All bytes until the other side closes."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")  # and empty SETTINGS
PING = bytes.fromhex("000008060000000000") + bytes(8)
HANDSHAKE, IDLE = "grpc.server_handshake_timeout_ms", "grpc.max_connection_idle_ms"
OWN = [("grpc.use_local_subchannel_pool", 1)]


@pytest.mark.parametrize(
    ("limits", "settings", "sent", "reason"),
    [
        ({HANDSHAKE: 100}, {}, b"", b""),
        ({HANDSHAKE: 100}, {}, b"PRI * HTTP", b""),
        ({IDLE: 100}, {}, PREFACE, b"connection idle"),
        ({}, {"max_connection_age": 0.1, "grace": 0.1}, PREFACE, b"max_age"),
        ({}, {}, PREFACE + PING * 20, b"too_many_pings"),
        ({}, {}, b"GET / HTTP/1.1\r\n\r\n", b""),
    ],
    ids=["silent", "half a preface", "idle", "old", "pings", "no HTTP/2"],
)
def test_bad_connections_are_closed(
    small: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], settings: dict[str, Any], sent: bytes, reason: bytes
) -> None:
    """A connection that stays silent, idle or open too long, or pings too often, is closed with the reason; others are served."""

    async def main() -> None:
        async with limited(small, monkeypatch, limits, **settings) as address:
            connection = listen(address)
            with connection:
                connection.sendall(sent)
                received = await asyncio.to_thread(read_all, connection)
            assert reason in received
            async with grpc.aio.insecure_channel(address) as channel:
                assert (await FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]))).words == ["fizz"]

    asyncio.run(main())


def test_a_client_of_old_connections_notices_nothing(small: Path) -> None:
    """Calls are all answered while their connections are closed by age again and again."""
    peers: set[tuple[int, ...]] = set()

    async def main() -> None:
        async with inside(small, max_connection_age=0.05) as (_, channel):
            while len(peers) < 3:
                call = FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]))
                assert (await call).words == ["fizz"]
                peers.add(connections())

    def connections() -> tuple[int, ...]:
        """The local ports of this process's connections."""
        return tuple(sorted(each.laddr.port for each in psutil.Process().net_connections("tcp") if each.status == "ESTABLISHED"))

    asyncio.run(main())


def test_keepalive_pings_are_accepted() -> None:
    """A client may ping every 10 s, as gRPC allows, also without a call."""
    assert app.CONNECTION_OPTIONS["grpc.http2.min_recv_ping_interval_without_data_ms"] < 10_000
    assert app.CONNECTION_OPTIONS["grpc.keepalive_permit_without_calls"] == 1


def test_concurrent_streams(small: Path, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """More concurrent calls than a connection may have wait in the client, and are answered in turn."""
    visits = Visits(monkeypatch)

    async def main() -> None:
        async with inside(small, max_concurrent_streams=2) as (server, channel):
            calls = [FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[number])) for number in range(6)]
            for _ in range(2):
                await visits.came.acquire()
            async with grpc.aio.insecure_channel(server.config.address, OWN) as other:  # not blocked by this connection
                call = FizzBuzzStub(other).Answer(AnswerRequest(numbers=[7]))
                await visits.came.acquire()
                assert visits.came.locked()  # no other call has arrived
                engine.open.set()
                assert (await call).words == ["7"]
            assert [(await call).words for call in calls] == [[str(number)] for number in range(6)]

    asyncio.run(main())


def test_message_size(small: Path) -> None:
    """A message that is too large, before or after decompression, is RESOURCE_EXHAUSTED, and the service goes on."""

    async def main() -> None:
        async with inside(small, max_message_bytes=10_000) as (_, channel):
            for content, compression in ((bytes(10_001), None), (bytes(2**24), grpc.Compression.Gzip)):
                call = channel.unary_unary("/tercet.v1.FizzBuzz/Answer", request_serializer=bytes)(content, compression=compression)
                assert await call.code() == StatusCode.RESOURCE_EXHAUSTED
                assert "larger than max" in await call.details()
            assert (await FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]))).words == ["fizz"]

    asyncio.run(main())


def test_thousands_of_calls_on_one_connection(small: Path) -> None:
    """More calls than gRPC's default of pending ones, and than a connection's streams, are all answered."""

    async def main() -> None:
        async with inside(small) as (_, channel):
            calls = [FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[number % 100])) for number in range(4000)]
            codes = [await call.code() for call in calls]
        assert Counter(codes) == {StatusCode.OK: len(calls)}

    asyncio.run(main())


HOOK = """
import os, sys
log = os.open(os.environ["WRITES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"}
def hook(event, args):
    opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if opened or (event in changes and not isinstance(args[0], int)):  # a descriptor is of a file that was opened
        in_folder = event in ("os.remove", "os.rmdir") and args[1] != -1
        folder = os.readlink(f"/proc/self/fd/{args[1]}") if in_folder else ""
        os.write(log, f"{event} {folder} {args[0]!r}\\n".encode())
sys.addaudithook(hook)
"""


def test_nothing_is_written_elsewhere(small: Path, tmp_path: Path) -> None:
    """Neither service nor client writes outside the folder for temporary files, or needs a home.

    What onnxruntime wrote, of which Python hears nothing, was in the home.
    """
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "temporary").mkdir()
    environment: dict[str, Any] = {
        "HOME": str(tmp_path / "nowhere"),
        "TMPDIR": str(tmp_path / "temporary"),
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "WRITES": str(tmp_path / "writes"),
    }
    with serving(small, "--workers", "2", "--metrics-port", "0", **environment) as service:
        output = run("tercet", "predict", "fizzbuzz", "15", "--server", service.address, cwd=tmp_path, **environment).stdout
        assert output == "fizzbuzz\n"
    writes = (tmp_path / "writes").read_text().splitlines()
    elsewhere = [line for line in writes if str(tmp_path / "temporary") not in line and "'/dev/" not in line]
    assert elsewhere == []
    assert writes  # the workers' metrics are files
    assert not (tmp_path / "nowhere").exists()


def test_metadata_while_another_version_is_installed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata have the running version, whatever is installed by now; the fuzzer had found it empty."""
    monkeypatch.setattr("tercet.server.servicers.inference.version", Mock(return_value=None))

    async def main() -> None:
        async with inside(small) as (_, channel):
            metadata = await GRPCInferenceServiceStub(channel).ServerMetadata(ServerMetadataRequest())
        assert (metadata.name, bool(metadata.version)) == ("tercet", True)

    asyncio.run(main())
