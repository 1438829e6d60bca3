"""TLS, tokens, limits of a connection and of a request, signatures: each over a real channel, or at a real start."""

import asyncio
import datetime as dt
import io
import ipaddress
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import grpc
import numpy as np
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from google.rpc.error_details_pb2 import BadRequest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from tercet.client import Client
from tercet.errors import InvalidInputError, StartupError, shorten
from tercet.proto.digits_pb2 import ClassifyRequest
from tercet.proto.digits_pb2 import Image as Picture
from tercet.proto.digits_pb2_grpc import DigitsStub
from tercet.proto.fizzbuzz_pb2 import AnswerRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import RepositoryModelLoadRequest, ServerMetadataRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server import app as server_
from tercet.server.app import Server
from tercet.server.config import Config
from tercet.server.images import MAX_PIXELS, MAX_SCANS, START_OF_SCAN, Allowance, decode_image
from tercet.server.repository import load
from tercet.server.signature import sign

from tests.conftest import REPOSITORY, Service, run, serving
from tests.server.test_errors import HeldEngine, Visits, fields, inside, refusal, refused, unpack
from tests.server.test_errors import engine as engine  # noqa: PLC0414  a fixture
from tests.server.test_images import bomb, encoded, four

PEM = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()


class Identity(NamedTuple):
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write both as PEM files, whole; return their paths."""
        contents = {f"{name}.pem": self.certificate.public_bytes(Encoding.PEM), f"{name}.key": self.key.private_bytes(*PEM)}
        for file, content in contents.items():
            (folder / f".{file}").write_bytes(content)
            (folder / f".{file}").rename(folder / file)
        return folder / f"{name}.pem", folder / f"{name}.key"


def issue(name: str, authority: Identity | None = None) -> Identity:
    """A certificate for this machine, or without `authority` one that can sign others."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = (
        x509.CertificateBuilder(serial_number=x509.random_serial_number(), subject_name=subject, public_key=key.public_key())
        .issuer_name(authority.certificate.subject if authority else subject)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return Identity(builder.sign(authority.key if authority else key, hashes.SHA256()), key)


@pytest.fixture(scope="module")
def small(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fizzbuzz alone: it starts quickly."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(workspace / "models" / "fizzbuzz", folder / "fizzbuzz")
    return folder


@pytest.fixture
def authority(tmp_path: Path) -> Identity:
    """Who signs certificates; its own is in ca.pem."""
    made = issue("authority")
    made.write(tmp_path, "ca")
    return made


def ask(service: Service, **options: Any) -> Sequence[str]:
    """One call on a connection of its own."""
    with Client(service.address, timeout=20, **options) as client:
        return client.answer([15])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_tls_with_token(small: Path, tmp_path: Path, authority: Identity, workers: str) -> None:
    """Over TLS and with the token, and only so, calls are answered; however many workers there are."""
    certificate, key = issue("service", authority).write(tmp_path, "service")
    (tmp_path / "tokens").write_text("secret\n")
    flags = ("--tls-certificate", str(certificate), "--tls-key", str(key), "--token-file", str(tmp_path / "tokens"))
    with serving(small, *flags, "--workers", workers) as service:
        assert service.process.stdout
        hint = f"  export TERCET_SERVER=HOST:{service.address.rpartition(':')[2]}\n"  # a certificate is for names
        assert hint in iter(service.process.stdout.readline, "  tercet fizzbuzz 1 30\n")
        assert ask(service, tls_ca=tmp_path / "ca.pem", token="secret") == ["fizzbuzz"]  # noqa: S106
        assert refused(partial(ask, service, tls_ca=tmp_path / "ca.pem")).code() == StatusCode.UNAUTHENTICATED
        stranger, _ = issue("stranger").write(tmp_path, "stranger")
        for wrong in ({}, {"tls_ca": stranger}):
            assert refused(partial(ask, service, token="secret", **wrong)).code() == StatusCode.UNAVAILABLE  # noqa: S106
        flags = ("--server", service.address, "--token", "secret", "--tls-ca", "ca.pem")
        assert run("tercet", "fizzbuzz", "3", "3", *flags, cwd=tmp_path).stdout == "fizz\n"
        health = ("python", "-m", "tercet.cli.health", service.address)
        assert run(*health, cwd=REPOSITORY, TERCET_TLS_CA=str(tmp_path / "ca.pem")).stdout == "SERVING\n"
        assert run(*health, cwd=REPOSITORY, check=False).returncode == 1


def test_mtls(small: Path, tmp_path: Path, authority: Identity) -> None:
    """With --tls-client-ca, callers need a certificate of that authority."""
    certificate, key = issue("service", authority).write(tmp_path, "service")
    mine, my_key = issue("caller", authority).write(tmp_path, "caller")
    other, other_key = issue("other", issue("another authority")).write(tmp_path, "other")
    flags = ("--tls-certificate", certificate, "--tls-key", key, "--tls-client-ca", tmp_path / "ca.pem")
    with serving(small, *map(str, flags)) as service:
        known = {"tls_ca": tmp_path / "ca.pem"}
        assert ask(service, **known, tls_certificate=mine, tls_key=my_key) == ["fizzbuzz"]
        for wrong in ({}, {"tls_certificate": other, "tls_key": other_key}):
            assert refused(partial(ask, service, **known, **wrong)).code() == StatusCode.UNAVAILABLE


def test_client_does_not_fall_back_to_plain_text(tmp_path: Path, authority: Identity) -> None:
    """Who names a certificate without its key, or without the authority to trust, is told so before anything is sent."""
    certificate, key = authority.write(tmp_path, "caller")
    incomplete: list[dict[str, Any]] = [{"tls_certificate": certificate, "tls_key": key}, {"tls_ca": certificate, "tls_key": key}]
    for wrong in incomplete:
        with pytest.raises(ValueError, match="go together"):
            Client("127.0.0.1:1", **wrong)
    done = run("tercet", "fizzbuzz", "1", "3", "--tls-certificate", str(certificate), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("tercet: a client certificate and its key go together, and need the CAs to trust: --tls-ca")


def test_certificate_is_renewed(small: Path, tmp_path: Path) -> None:
    """A certificate that was renewed on disk is shown to the next connection; one without its key yet, or damaged, is not."""
    first, second = issue("first"), issue("second")
    certificate, key = first.write(tmp_path, "service")
    trusted = [identity.write(tmp_path, name)[0] for identity, name in ((first, "first"), (second, "second"))]
    with serving(small, "--tls-certificate", str(certificate), "--tls-key", str(key)) as service:
        assert ask(service, tls_ca=trusted[0]) == ["fizzbuzz"]
        with Client(service.address, tls_ca=trusted[0]) as before:
            assert before.answer([3]) == ["fizz"]
            for content in (b"damaged", trusted[1].read_bytes()):  # the key comes later
                certificate.write_bytes(content)
                assert ask(service, tls_ca=trusted[0]) == ["fizzbuzz"]
            second.write(tmp_path, "service")
            assert ask(service, tls_ca=trusted[1]) == ["fizzbuzz"]
            assert refused(partial(ask, service, tls_ca=trusted[0])).code() == StatusCode.UNAVAILABLE
            assert before.answer([3]) == ["fizz"]  # its connection stays


ANY = "0.0.0.0"  # noqa: S104  that is what is tested


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": ANY}, "give --tls-certificate and --tls-key, or say --insecure"),
        ({"host": "::"}, "or say --insecure"),
        ({"tls_certificate": "ca.pem"}, "--tls-certificate and --tls-key go together"),
        ({"tls_client_ca": "ca.pem"}, "needs both"),
        ({"tls_certificate": "ca.pem", "tls_key": "nowhere"}, "cannot be read"),
        ({"tls_certificate": "ca.pem", "tls_key": "other.key"}, "ca.pem and other.key are no pair"),
        ({"tls_certificate": "ca.pem", "tls_key": "locked.key"}, "the key without a password"),
        ({"tls_certificate": "ca.pem", "tls_key": "ca.key", "tls_client_ca": "ca.key"}, "ca.key holds no certificates"),
        ({"tls_certificate": "ca.pem", "tls_key": "ca.key", "tls_client_ca": "nowhere"}, "nowhere or its key cannot be read"),
        ({"token_file": "ca.pem"}, "token 1 cannot be sent"),
        ({"require_signed": "nowhere"}, "nowhere cannot be read"),
        ({"require_signed": "no.pem"}, "no.pem is no key in a PEM file"),
        ({"require_signed": "ca.key"}, "no public ed25519 key"),
    ],
)
def test_unsafe_settings(
    small: Path, tmp_path: Path, authority: Identity, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], text: str
) -> None:
    """What would not be safe, or cannot be, is refused in a sentence that says what to do."""
    monkeypatch.chdir(tmp_path)
    issue("other").write(tmp_path, "other")
    Path("locked.key").write_bytes(authority.key.private_bytes(*PEM[:2], BestAvailableEncryption(b"password")))
    Path("no.pem").touch()

    async def start() -> None:
        Server(Config(port=0, models=small, **{k: v if k == "host" else Path(v) for k, v in settings.items()}))  # type: ignore[arg-type]

    with pytest.raises(StartupError, match=re.escape(text)):
        asyncio.run(start())


def test_workers_do_not_start_unsafe(small: Path) -> None:
    """Several workers do not start in plain text where others can call, either."""
    assert "or say --insecure" in refusal("--models", str(small), "--port", "0", "--workers", "2", "--host", ANY)


def test_insecure_when_said(small: Path) -> None:
    """With --insecure, a host that others reach is served in plain text."""
    with serving(small, "--host", ANY, TERCET_INSECURE="1") as service:
        assert ask(Service(service.process, service.address.replace(ANY, "127.0.0.1"), "")) == ["fizzbuzz"]


def test_tokens_are_rotated(small: Path, tmp_path: Path) -> None:
    """Each line of the file is a token; a changed file counts at once, and one that is empty or gone changes nothing."""
    tokens = tmp_path / "tokens"
    tokens.write_text("old\n\nnew\n")
    with serving(small, "--token-file", str(tokens)) as service:

        def accepted(token: str) -> bool:
            try:
                return ask(service, token=token) == ["fizzbuzz"]
            except grpc.RpcError as error:
                assert error.code() == StatusCode.UNAUTHENTICATED  # noqa: PT017  checks what is not asserted elsewhere
                return False

        assert [accepted(token) for token in ("old", "new", "newest", "oldnew", "")] == [True, True, False, False, False]
        tokens.write_text("new\nnewest\n")
        assert [accepted(token) for token in ("old", "new", "newest")] == [False, True, True]
        tokens.write_text("")
        assert [accepted(token) for token in ("new", "")] == [True, False]
        tokens.unlink()
        assert accepted("new")
        with grpc.insecure_channel(service.address) as channel:
            for sent in ("new", "Basic new", "Bearer  new", "bearer new"):
                call = partial(FizzBuzzStub(channel).Answer, AnswerRequest(numbers=[3]), metadata=[("authorization", sent)])
                assert call().words == ["fizz"] if sent == "bearer new" else refused(call).code() == StatusCode.UNAUTHENTICATED
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1


def test_no_interceptor_without_token(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody asked for costs nothing: calls pass an interceptor only when there are tokens."""
    made = Mock(wraps=grpc.aio.server)
    monkeypatch.setattr(grpc.aio, "server", made)
    (tmp_path / "tokens").write_text("secret")

    async def main() -> None:
        for settings in ({}, {"token_file": tmp_path / "tokens"}):
            async with inside(small, **settings):
                pass

    asyncio.run(main())
    assert [len(call.kwargs["interceptors"]) for call in made.call_args_list] == [0, 1]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key, made as the documentation says."""
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    made = ed25519.Ed25519PrivateKey.generate()
    private.write_bytes(made.private_bytes(*PEM))
    public.write_bytes(made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """The folder of a model that may be changed."""
    return Path(shutil.copytree(small, tmp_path / "models")) / "fizzbuzz"


def test_only_signed_models_start(model: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """With --require-signed a model is served only as its signer has left it; without, the signature does not matter."""
    private, public = keys
    config, signature = Config(models=model.parent, require_signed=public), model / "card.json.sig"
    with pytest.raises(StartupError, match=f"{signature} cannot be read, and what is not signed is not served"):
        load(model, config)
    assert run("tercet", "sign", str(model), "--key", str(private), cwd=model).stdout == f"{signature}\n"
    with serving(model.parent, "--require-signed", str(public)) as service:
        assert ask(service) == ["fizzbuzz"]
    (model / "card.json").write_bytes((model / "card.json").read_bytes() + b" ")
    with pytest.raises(StartupError, match=f"{signature} is no signature of this card.json by the owner of {public}"):
        load(model, config)
    assert load(model, Config()).card.name == "fizzbuzz"
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*PEM))
    sign(model, stranger)
    with pytest.raises(StartupError, match=r"is no signature of this card\.json"):
        load(model, config)
    with pytest.raises(StartupError, match="no private ed25519 key"):
        sign(model, public)


def test_a_model_that_is_not_whole_is_not_signed(model: Path, keys: tuple[Path, Path]) -> None:
    """Nobody signs files that are not those of the card."""
    os.truncate(model / "model.onnx", 9)
    done = run("tercet", "sign", str(model), "--key", str(keys[0]), cwd=model, check=False)
    assert (done.returncode, "model.onnx is not the file that its card.json describes" in done.stdout) == (1, True)
    assert not (model / "card.json.sig").exists()


def test_only_signed_models_are_loaded(model: Path, keys: tuple[Path, Path]) -> None:
    """A card that changes without a new signature is refused at reload, before it is parsed, and the old one goes on."""
    private, public = keys
    sign(model, private)

    async def main() -> None:
        async with inside(model.parent, require_signed=public, watch=0) as (_, channel):
            load = partial(GRPCInferenceServiceStub(channel).RepositoryModelLoad, RepositoryModelLoadRequest(model_name="fizzbuzz"))
            await load()
            (model / "card.json").write_bytes(b"not even a card")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await load()
            assert caught.value.code() == StatusCode.FAILED_PRECONDITION
            assert "is no signature of this card.json" in str(caught.value.details())
            assert (await FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]))).words == ["fizz"]

    asyncio.run(main())


def test_a_late_signature_is_noticed(model: Path, keys: tuple[Path, Path]) -> None:
    """A new card that was refused for its signature is served once the right one is there."""
    private, public = keys
    sign(model, private)

    async def main() -> None:
        async with inside(model.parent, require_signed=public, watch=0) as (server, _):
            card = json.loads((model / "card.json").read_bytes())
            (model / "card.json").write_text(json.dumps({**card, "description": "new"}))
            await server.follow(at_once=True)
            assert server.repository.get("fizzbuzz").card.description != "new"
            sign(model, private)
            await server.follow(at_once=True)
            assert server.repository.get("fizzbuzz").card.description == "new"

    asyncio.run(main())


def raw(channel: grpc.Channel, method: str, content: bytes) -> Any:
    """Send bytes as a request; return the response's bytes."""
    return channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)(content, timeout=60)


ANSWER, INFER = "/tercet.v1.FizzBuzz/Answer", "/inference.GRPCInferenceService/ModelInfer"
METHODS = [
    ANSWER,
    INFER,
    "/tercet.v1.Digits/Classify",
    "/tercet.v1.Diabetes/Assess",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/RepositoryIndex",
    "/grpc.health.v1.Health/Check",
]


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message(default_service: Service, method: str) -> None:
    """A request that cannot be parsed is INVALID_ARGUMENT, as whatever else is wrong with a request."""
    with grpc.insecure_channel(default_service.address) as channel:
        error = refused(partial(raw, channel, method, b"\xff"))
    assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, ["request"])
    assert "Error parsing message" in error.details()


@pytest.mark.parametrize("method", ["/tercet.v1.FizzBuzz/Count", "/inference.GRPCInferenceService/ModelStreamInfer"])
def test_bytes_that_are_no_message_in_a_stream(default_service: Service, method: str) -> None:
    """A streaming method says the same; a stream of requests says it in band and goes on."""
    with grpc.insecure_channel(default_service.address) as channel:
        if method.endswith("Count"):
            call = channel.unary_stream(method, request_serializer=bytes, response_deserializer=bytes)(b"\xff", timeout=60)
            assert refused(lambda: next(call)).code() == StatusCode.INVALID_ARGUMENT
        else:
            said = list(channel.stream_stream(method, request_serializer=bytes, response_deserializer=bytes)(iter([b"\xff"] * 2)))
            assert len(said) == 2
            assert all(b"request: Error parsing" in content for content in said)


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field_(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


MUCH = 2**21  # entries that take two bytes or one each
FIZZBUZZ, NUMBER = field_(1, b"fizzbuzz"), field_(1, b"number") + field_(2, b"INT64")
LONG = {
    "numbers": (ANSWER, field_(1, b"\x01" * MUCH), "numbers"),
    "patients": ("/tercet.v1.Diabetes/Assess", b"\x0a\x00" * MUCH, "patients"),
    "images": ("/tercet.v1.Digits/Classify", b"\x0a\x00" * MUCH, "images"),
    "model": (INFER, field_(1, b"m" * MUCH), ""),
    "version": (INFER, FIZZBUZZ + field_(2, b"v" * MUCH), ""),
    "tensors": (INFER, FIZZBUZZ + b"\x2a\x00" * MUCH, "inputs"),
    "tensor": (INFER, FIZZBUZZ + field_(5, field_(1, "ü".encode() * MUCH)), "inputs"),
    "datatype": (INFER, FIZZBUZZ + field_(5, field_(1, b"number") + field_(2, b"\x01" * MUCH)), "inputs[0].datatype"),
    "shape": (INFER, FIZZBUZZ + field_(5, NUMBER + field_(3, b"\x01" * MUCH)), "inputs[0].shape"),
    "values": (INFER, FIZZBUZZ + field_(5, NUMBER + field_(3, b"\x01") + field_(5, field_(3, b"\x01" * MUCH))), "int64_contents"),
    "outputs": (INFER, FIZZBUZZ + field_(5, NUMBER) + b"\x32\x00" * MUCH, "inputs[0].shape"),
    "unload": ("/inference.GRPCInferenceService/RepositoryModelUnload", field_(2, b"m" * MUCH), ""),
    "load": ("/inference.GRPCInferenceService/RepositoryModelLoad", field_(2, b"m" * MUCH), ""),
    "nothing to load": ("/inference.GRPCInferenceService/RepositoryModelLoad", b"", ""),
}


@pytest.mark.parametrize("case", LONG)
def test_long_requests_get_short_answers(default_service: Service, case: str) -> None:
    """However much a request has of what is wrong, the client gets the right code, and a text that fits into its metadata."""
    method, content, field = LONG[case]
    with grpc.insecure_channel(default_service.address, [("grpc.max_metadata_size", 8192)]) as channel:
        error = refused(partial(raw, channel, method, content))
    assert error.code() == (StatusCode.INVALID_ARGUMENT if field else StatusCode.NOT_FOUND)
    assert all(field in found for found in fields(error))
    assert len(unpack(error, BadRequest)) == bool(field)


@pytest.mark.parametrize("text", ["", "x" * 30, "x" * 31, "ü" * 16, "€" * 10**6, "\ud800" * 31])
def test_shorten(text: str) -> None:
    """A text that is short enough stays; of a long one the beginning and the end stay."""
    short = shorten(text, 30)
    if len(text.encode(errors="replace")) <= 30:
        assert short == text
    else:
        assert len(short.encode()) <= 30 + len(" ... ")
        assert " ... " in short


@pytest.mark.parametrize("case", ["numbers", "patients", "images"])
def test_rows_are_counted_before_they_are_decoded(workspace: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Too many rows are refused without a look at any of them, which would take minutes and gigabytes."""
    looked = Mock()
    for name in ("diabetes.decode", "digits.decode", "fizzbuzz.say"):
        monkeypatch.setattr(f"tercet.server.servicers.{name}", looked)

    async def main() -> None:
        async with inside(workspace / "models") as (_, channel):
            method, content, _ = LONG[case]
            with pytest.raises(grpc.aio.AioRpcError, match="a request has 1 to"):
                await raw(channel, method, content)
        looked.assert_not_called()

    asyncio.run(main())


MOST = 4096  # side of the largest picture


def test_scan_bomb() -> None:
    """A JPEG file whose last scan is repeated, 20 ms and 33 bytes each, is refused before the first is read."""
    file = io.BytesIO()
    four(800, 1200).save(file, "JPEG", progressive=True)
    good = file.getvalue()
    assert decode_image(good, "image").any()
    start = good.rindex(START_OF_SCAN)
    with pytest.raises(InvalidInputError, match=f"more than {MAX_SCANS} scans"):
        decode_image(good[:-2] + good[start:-2] * MAX_SCANS + good[-2:], "image")


def test_dust() -> None:
    """Two specks, far apart, of which nothing is left when they are scaled to a digit's size, are no digit."""
    field = np.full((MOST, MOST), 255, np.uint8)
    field[0, 0] = field[-1, -1] = 0
    with pytest.raises(InvalidInputError, match="blank"):
        decode_image(encoded(Image.fromarray(field)), "image")


def test_pixels_of_a_request() -> None:
    """A request may have many pictures and large ones, but not many large ones; that is told before the last is decoded."""
    allowance = Allowance()
    for _ in range(4):
        with pytest.raises(InvalidInputError, match="no readable"):
            decode_image(bomb(MOST, MOST), "image", allowance)
    with pytest.raises(InvalidInputError, match="use more requests"):
        decode_image(bomb(1, 1), "images[4].encoded", allowance)


def test_many_large_pictures(default_service: Service) -> None:
    """The client is told which picture is too much, and the service answers others meanwhile and after it."""
    large, digit = encoded(Image.fromarray(np.pad(np.asarray(four()), MOST // 3, constant_values=255))), encoded(four())
    count = 4 * MAX_PIXELS // (Image.open(io.BytesIO(large)).width * Image.open(io.BytesIO(large)).height)
    with grpc.insecure_channel(default_service.address) as channel:
        pictures = [Picture(encoded=large)] * (count + 1)
        error = refused(partial(DigitsStub(channel).Classify, ClassifyRequest(images=pictures)))
        assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, [f"images[{count}].encoded"])
        assert len(DigitsStub(channel).Classify(ClassifyRequest(images=[Picture(encoded=digit)] * 100)).digits) == 100


@asynccontextmanager
async def limited(folder: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], **settings: Any) -> AsyncIterator[Any]:
    """A server whose connections have these limits, and its address."""
    assert limits.keys() <= server_.CONNECTION.keys()  # they are set to something in the first place
    monkeypatch.setattr("tercet.server.app.CONNECTION", {**server_.CONNECTION, **limits})
    async with inside(folder, **settings) as (server, _):
        yield server.config.address


def listen(address: str) -> socket.socket:
    """A connection without a client behind it."""
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=60)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")  # and empty SETTINGS
PING = bytes.fromhex("000008060000000000") + bytes(8)
HANDSHAKE, IDLE = "grpc.server_handshake_timeout_ms", "grpc.max_connection_idle_ms"
OWN = [("grpc.use_local_subchannel_pool", 1)]


@pytest.mark.parametrize(
    ("limits", "settings", "sent", "said"),
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
def test_connections_are_let_go(
    small: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], settings: dict[str, Any], sent: bytes, said: bytes
) -> None:
    """Who connects and says nothing, stays too long, or pings all the time is told why and let go; others are answered."""

    async def main() -> None:
        async with limited(small, monkeypatch, limits, **settings) as address:
            connection = listen(address)
            with connection:
                connection.sendall(sent)
                heard = await asyncio.to_thread(read_all, connection)
            assert said in heard
            async with grpc.aio.insecure_channel(address) as channel:
                assert (await FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]))).words == ["fizz"]

    asyncio.run(main())


def test_a_client_of_old_connections_notices_nothing(small: Path) -> None:
    """Calls over connections that end by their age, again and again, are all answered."""
    peers: set[tuple[int, ...]] = set()

    async def main() -> None:
        async with inside(small, max_connection_age=0.05) as (_, channel):
            while len(peers) < 3:
                call = FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]))
                assert (await call).words == ["fizz"]
                peers.add(connections())

    def connections() -> tuple[int, ...]:
        """The ports of this process's ends."""
        return tuple(sorted(found.laddr.port for found in psutil.Process().net_connections("tcp") if found.status == "ESTABLISHED"))

    asyncio.run(main())


def test_patient_pings_are_welcome() -> None:
    """A client may ping as often as gRPC lets it, every 10 s, also without a call."""
    assert server_.CONNECTION["grpc.http2.min_recv_ping_interval_without_data_ms"] < 10_000
    assert server_.CONNECTION["grpc.keepalive_permit_without_calls"] == 1


def test_concurrent_streams(small: Path, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """More calls than a connection may have wait at the client, and are answered in their turn."""
    visits = Visits(monkeypatch)

    async def main() -> None:
        async with inside(small, max_concurrent_streams=2) as (server, channel):
            calls = [FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[number])) for number in range(6)]
            for _ in range(2):
                await visits.came.acquire()
            async with grpc.aio.insecure_channel(server.config.address, OWN) as other:  # others are not held up
                call = FizzBuzzStub(other).Answer(AnswerRequest(numbers=[7]))
                await visits.came.acquire()
                assert visits.came.locked()  # nobody else has come
                engine.open.set()
                assert (await call).words == ["7"]
            assert [(await call).words for call in calls] == [[str(number)] for number in range(6)]

    asyncio.run(main())


def test_message_size(small: Path) -> None:
    """A message that is too large, or becomes so when it is unpacked, is RESOURCE_EXHAUSTED, and the service goes on."""

    async def main() -> None:
        async with inside(small, max_message_bytes=10_000) as (_, channel):
            for content, compression in ((bytes(10_001), None), (bytes(2**24), grpc.Compression.Gzip)):
                call = channel.unary_unary(ANSWER, request_serializer=bytes)(content, compression=compression)
                assert await call.code() == StatusCode.RESOURCE_EXHAUSTED
                assert "larger than max" in await call.details()
            assert (await FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]))).words == ["fizz"]

    asyncio.run(main())


def test_thousands_of_calls_on_one_connection(small: Path) -> None:
    """Calls beyond what gRPC has pending by default, and beyond the streams of a connection, are all answered."""

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
    if opened or event in changes:
        beside = event in ("os.remove", "os.rmdir") and args[1] != -1
        folder = os.readlink(f"/proc/self/fd/{args[1]}") if beside else ""
        os.write(log, f"{event} {folder} {args[0]!r}\\n".encode())
sys.addaudithook(hook)
"""


def test_nothing_is_written_elsewhere(small: Path, tmp_path: Path) -> None:
    """Neither service nor client writes outside the folder for temporary files, as Python's audit hook tells, or needs a home.

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
        said = run("tercet", "predict", "fizzbuzz", "15", "--server", service.address, cwd=tmp_path, **environment).stdout
        assert said == "fizzbuzz\n"
    writes = (tmp_path / "writes").read_text().splitlines()
    elsewhere = [line for line in writes if str(tmp_path / "temporary") not in line and "'/dev/" not in line]
    assert elsewhere == []
    assert writes  # the workers' metrics are files
    assert not (tmp_path / "nowhere").exists()


def test_metadata_while_another_version_is_installed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service says which version runs, whatever of it lies on the disk by now; the fuzzer had found it to say nothing."""
    monkeypatch.setattr("tercet.server.servicers.inference.version", Mock(return_value=None))

    async def main() -> None:
        async with inside(small) as (_, channel):
            said = await GRPCInferenceServiceStub(channel).ServerMetadata(ServerMetadataRequest())
        assert (said.name, bool(said.version)) == ("tercet", True)

    asyncio.run(main())
