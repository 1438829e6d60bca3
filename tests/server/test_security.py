"""TLS, tokens and signatures, over a real channel or at startup."""

import asyncio
import datetime as dt
import ipaddress
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import grpc
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
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tercet.client import Client
from tercet.errors import StartupError
from tercet.proto.fizzbuzz_pb2 import AnswerRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import RepositoryModelLoadRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server.app import Server
from tercet.server.config import Config
from tercet.server.repository import load_model
from tercet.server.security import sign_model

from tests.conftest import REPOSITORY, Service, run, serving
from tests.server.support import ask, inside, refusal, refused

pytestmark = pytest.mark.slow

PEM = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()


class Identity(NamedTuple):
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write both as PEM files, atomically; return their paths."""
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


@pytest.fixture
def authority(tmp_path: Path) -> Identity:
    """A CA; its own certificate is in ca.pem."""
    identity = issue("authority")
    identity.write(tmp_path, "ca")
    return identity


@pytest.mark.parametrize("workers", ["1", "2"])
def test_tls_with_token(small: Path, tmp_path: Path, authority: Identity, workers: str) -> None:
    """Calls are answered only over TLS and with the token, with any number of workers."""
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
    """With --tls-client-ca, clients need a certificate from that CA."""
    certificate, key = issue("service", authority).write(tmp_path, "service")
    mine, my_key = issue("caller", authority).write(tmp_path, "caller")
    other, other_key = issue("other", issue("another authority")).write(tmp_path, "other")
    flags = ("--tls-certificate", certificate, "--tls-key", key, "--tls-client-ca", tmp_path / "ca.pem")
    with serving(small, *map(str, flags)) as service:
        trust = {"tls_ca": tmp_path / "ca.pem"}
        assert ask(service, **trust, tls_certificate=mine, tls_key=my_key) == ["fizzbuzz"]
        for wrong in ({}, {"tls_certificate": other, "tls_key": other_key}):
            assert refused(partial(ask, service, **trust, **wrong)).code() == StatusCode.UNAVAILABLE


def test_client_does_not_fall_back_to_plain_text(tmp_path: Path, authority: Identity) -> None:
    """A certificate without its key, or without the CA to trust, is an error before anything is sent."""
    certificate, key = authority.write(tmp_path, "caller")
    incomplete: list[dict[str, Any]] = [{"tls_certificate": certificate, "tls_key": key}, {"tls_ca": certificate, "tls_key": key}]
    for wrong in incomplete:
        with pytest.raises(ValueError, match="go together"):
            Client("127.0.0.1:1", **wrong)
    done = run("tercet", "fizzbuzz", "1", "3", "--tls-certificate", str(certificate), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert (
        "a client certificate and its key go together, and need the CAs to trust: --tls-ca, --tls-certificate, --tls-key"
        in done.stdout
    )


def test_certificate_is_renewed(small: Path, tmp_path: Path) -> None:
    """The next connection gets a certificate that was renewed on disk, unless it is damaged or its key is still missing."""
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


ANY = "0.0.0.0"  # noqa: S104  this is tested


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": ANY}, "set --tls-certificate and --tls-key, or --insecure"),
        ({"host": "::"}, "or --insecure if"),
        ({"tls_certificate": "ca.pem"}, "--tls-certificate and --tls-key go together"),
        ({"tls_client_ca": "ca.pem"}, "needs both"),
        ({"tls_certificate": "ca.pem", "tls_key": "nowhere"}, "cannot be read"),
        ({"tls_certificate": "ca.pem", "tls_key": "other.key"}, "ca.pem and other.key are not a pair"),
        ({"tls_certificate": "ca.pem", "tls_key": "locked.key"}, "the key without a password"),
        ({"tls_certificate": "ca.pem", "tls_key": "ca.key", "tls_client_ca": "ca.key"}, "ca.key has no certificates"),
        ({"tls_certificate": "ca.pem", "tls_key": "ca.key", "tls_client_ca": "nowhere"}, "nowhere cannot be read"),
        ({"token_file": "ca.pem"}, "ca.pem must have one token per line"),
        ({"require_signed": "nowhere"}, "nowhere cannot be read"),
        ({"require_signed": "no.pem"}, "no.pem is not a public ed25519 key"),
        ({"require_signed": "ca.key"}, "not a public ed25519 key"),
    ],
)
def test_unsafe_settings(
    small: Path, tmp_path: Path, authority: Identity, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], text: str
) -> None:
    """Unsafe or impossible settings are refused in a sentence that says what to do."""
    monkeypatch.chdir(tmp_path)
    issue("other").write(tmp_path, "other")
    Path("locked.key").write_bytes(authority.key.private_bytes(*PEM[:2], BestAvailableEncryption(b"password")))
    Path("no.pem").touch()

    async def start() -> None:
        Server(Config(port=0, models=small, **{k: v if k == "host" else Path(v) for k, v in settings.items()}))  # type: ignore[arg-type]

    with pytest.raises(StartupError, match=re.escape(text)):
        asyncio.run(start())


def test_workers_do_not_start_unsafe(small: Path) -> None:
    """Several workers, too, do not start in plain text where other machines can call."""
    assert "or --insecure if" in refusal("--models", str(small), "--port", "0", "--workers", "2", "--host", ANY)


def test_insecure(small: Path) -> None:
    """With --insecure, an address that other machines can reach is served in plain text."""
    with serving(small, "--host", ANY, TERCET_INSECURE="1") as service:
        assert ask(Service(service.process, service.address.replace(ANY, "127.0.0.1"), "")) == ["fizzbuzz"]


def test_tokens_are_rotated(small: Path, tmp_path: Path) -> None:
    """Each line of the file is a token; a changed file takes effect at once, an empty or missing one changes nothing."""
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
    """Calls pass an interceptor only when there are tokens."""
    create = Mock(wraps=grpc.aio.server)
    monkeypatch.setattr(grpc.aio, "server", create)
    (tmp_path / "tokens").write_text("secret")

    async def main() -> None:
        for settings in ({}, {"token_file": tmp_path / "tokens"}):
            async with inside(small, **settings):
                pass

    asyncio.run(main())
    assert [len(call.kwargs["interceptors"]) for call in create.call_args_list] == [0, 1]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key, as in the documentation."""
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    key = ed25519.Ed25519PrivateKey.generate()
    private.write_bytes(key.private_bytes(*PEM))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """The folder of a model, for tests that change it."""
    return Path(shutil.copytree(small, tmp_path / "models")) / "fizzbuzz"


def test_only_signed_models_start(model: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """With --require-signed a model is served only as it was signed; without, the signature does not matter."""
    private, public = keys
    config, signature = Config(models=model.parent, require_signed=public), model / "card.json.sig"
    with pytest.raises(StartupError, match=f"{signature} is missing, or not a signature"):
        load_model(model, config)
    assert run("tercet", "sign", str(model), "--key", str(private), cwd=model).stdout == f"{signature}\n"
    with serving(model.parent, "--require-signed", str(public)) as service:
        assert ask(service) == ["fizzbuzz"]
    (model / "card.json").write_bytes((model / "card.json").read_bytes() + b" ")
    with pytest.raises(
        StartupError, match=f"{signature} is missing, or not a signature of this card.json by the owner of {public}"
    ):
        load_model(model, config)
    assert load_model(model, Config())[0].name == "fizzbuzz"
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*PEM))
    sign_model(model, stranger)
    with pytest.raises(StartupError, match=r"not a signature of this card\.json"):
        load_model(model, config)
    with pytest.raises(StartupError, match="not a private ed25519 key"):
        sign_model(model, public)


def test_a_damaged_model_is_not_signed(model: Path, keys: tuple[Path, Path]) -> None:
    """A model with a file that differs from its card is not signed."""
    os.truncate(model / "model.onnx", 9)
    done = run("tercet", "sign", str(model), "--key", str(keys[0]), cwd=model, check=False)
    assert (done.returncode, "model.onnx is not the file that its card.json describes" in done.stdout) == (1, True)
    assert not (model / "card.json.sig").exists()


def test_only_signed_models_are_loaded(model: Path, keys: tuple[Path, Path]) -> None:
    """A card that changes without a new signature is refused at reload, before it is parsed; the old version is still served."""
    private, public = keys
    sign_model(model, private)

    async def main() -> None:
        async with inside(model.parent, require_signed=public, watch=0) as (_, channel):
            load = partial(GRPCInferenceServiceStub(channel).RepositoryModelLoad, RepositoryModelLoadRequest(model_name="fizzbuzz"))
            await load()
            (model / "card.json").write_bytes(b"not even a card")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await load()
            assert caught.value.code() == StatusCode.FAILED_PRECONDITION
            assert "not a signature of this card.json" in str(caught.value.details())
            assert (await FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[3]))).words == ["fizz"]

    asyncio.run(main())


def test_a_late_signature_is_accepted(model: Path, keys: tuple[Path, Path]) -> None:
    """A new card that was refused for its signature is served once it has the right one."""
    private, public = keys
    sign_model(model, private)

    async def main() -> None:
        async with inside(model.parent, require_signed=public, watch=0) as (server, _):
            card = json.loads((model / "card.json").read_bytes())
            (model / "card.json").write_text(json.dumps({**card, "description": "new"}))
            await server.reload_changed(wait_until_stable=False)
            assert server.repository.get("fizzbuzz").card.description != "new"
            sign_model(model, private)
            await server.reload_changed(wait_until_stable=False)
            assert server.repository.get("fizzbuzz").card.description == "new"

    asyncio.run(main())
