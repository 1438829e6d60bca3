"""TLS: ALPN, client certificates, renewal, and handshakes that do not come to an end."""

import asyncio
import contextlib
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc import StatusCode
from tercet.server import transport

from tests.server.transport.conftest import PREFACE, add, connect, echo, failure, path, run, unary


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests")])
    now = dt.datetime.now(dt.UTC)
    names = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.UniformResourceIdentifier(f"spiffe://tests/{name}"),
    ]
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=1))
    builder = builder.not_valid_after(now + dt.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, private


def context(certificate: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """A server's context; with authorities for clients it demands a certificate."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificate, key)
    if client_ca:
        made.load_verify_locations(client_ca)
        made.verify_mode = ssl.CERT_REQUIRED
    return made


async def identity(_request: bytes, call: Any) -> bytes:
    """The client's names."""
    names = call.peer_identities()
    return b",".join([(call.peer_identity_key() or "").encode(), *(names or ()), *call.auth_context().get("x509_common_name", ())])


@contextlib.asynccontextmanager
async def running(contexts: Any, **options: int) -> AsyncIterator[int]:
    """A server with TLS; its port."""
    server = transport.server(options=list(options.items()))
    add(server, {"Echo": unary(echo), "Identity": unary(identity)})
    port = server.add_secure_port("127.0.0.1:0", contexts)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def channel(port: int, ca: Path, certificate: tuple[Path, Path] | None = None) -> AsyncIterator[Any]:
    """A client that trusts `ca` and may show a certificate."""
    chain, key = [file.read_bytes() for file in certificate] if certificate else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, chain)  # noqa: ASYNC240
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, [("grpc.use_local_subchannel_pool", 1)]) as opened:
        yield opened


def test_tls(tmp_path: Path) -> None:
    """Calls over TLS work, and a client that does not trust the certificate, or speaks plain text, gets UNAVAILABLE."""
    own, other = make_certificate(tmp_path, "own"), make_certificate(tmp_path, "other")

    async def main() -> None:
        async with running(context(*own)) as port:
            async with channel(port, own[0]) as client:
                big = bytes(2_000_000)
                assert await client.unary_unary(path("Echo"))(big) == big
                assert await client.unary_unary(path("Identity"))(b"") == b""
            async with channel(port, other[0]) as client:
                assert (await failure(client.unary_unary(path("Echo"))(b""))).code() is StatusCode.UNAVAILABLE
            async with connect(f"127.0.0.1:{port}") as client:
                assert (await failure(client.unary_unary(path("Echo"))(b""))).code() is StatusCode.UNAVAILABLE

    run(main)


def test_mtls(tmp_path: Path) -> None:
    """A client must show a certificate of an authority, and its names reach the handler as in grpc.aio."""
    own, client, stranger = (make_certificate(tmp_path, name) for name in ("own", "client", "stranger"))

    async def main() -> None:
        async with running(context(*own, client[0])) as port:
            async with channel(port, own[0], client) as opened:
                names = b"x509_subject_alternative_name,localhost,127.0.0.1,spiffe://tests/client,client"
                assert await opened.unary_unary(path("Identity"))(b"") == names
            for certificate in (None, stranger):
                async with channel(port, own[0], certificate) as opened:
                    assert (await failure(opened.unary_unary(path("Echo"))(b""))).code() is StatusCode.UNAVAILABLE

    run(main)


def test_auth_context_is_that_of_grpcio(tmp_path: Path) -> None:
    """Every key that we give has the value that grpc.aio gives."""
    own = make_certificate(tmp_path, "own")
    seen: list[dict[str, Any]] = []

    async def note(request: bytes, call: Any) -> bytes:
        seen.append(dict(call.auth_context()))
        return request

    async def main() -> None:
        pem, key = own[0].read_bytes(), own[1].read_bytes()
        theirs = grpc.ssl_server_credentials([(key, pem)], pem, require_client_auth=True)
        for make, credentials in ((transport.server, context(*own, own[0])), (grpc.aio.server, theirs)):
            server: Any = make()
            add(server, {"M": unary(note)})
            port = server.add_secure_port("127.0.0.1:0", credentials)
            await server.start()
            async with channel(port, own[0], own) as client:
                await client.unary_unary(path("M"))(b"")
            await server.stop(0)

    run(main)
    ours, theirs = seen
    assert ours.items() <= theirs.items()
    assert len(ours) >= 10


def test_renewal(tmp_path: Path) -> None:
    """New connections get the certificate, and are checked against the authorities, that hold when they are made; old ones stay."""
    first, second, client = (make_certificate(tmp_path, name) for name in ("first", "second", "client"))
    current = [context(*first, client[0])]

    async def main() -> None:
        async with running(lambda: current[0]) as port, channel(port, first[0], client) as old:
            echoed = old.unary_unary(path("Echo"))
            assert await echoed(b"x") == b"x"
            current[0] = context(*second, second[0])
            async with channel(port, second[0], second) as new:
                assert await new.unary_unary(path("Echo"))(b"x") == b"x"
            for ca, certificate in ((first[0], second), (second[0], client)):
                async with channel(port, ca, certificate) as wrong:
                    assert (await failure(wrong.unary_unary(path("Echo"))(b""))).code() is StatusCode.UNAVAILABLE
            assert await echoed(b"x") == b"x"

    run(main)


@pytest.mark.parametrize("protocols", [None, ["http/1.1"]])
def test_alpn(tmp_path: Path, protocols: list[str] | None) -> None:
    """A client that does not agree on h2 is let go, whatever it sends; so is one with TLS 1.1."""
    own = make_certificate(tmp_path, "own")
    trust = ssl.create_default_context(cafile=str(own[0]))
    if protocols:
        trust.set_alpn_protocols(protocols)

    async def main() -> None:
        async with running(context(*own)) as port:
            reader, writer = await asyncio.open_connection("localhost", port, ssl=trust)
            writer.write(PREFACE)
            assert await reader.read() == b""
            writer.close()

    run(main)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01\x00"], ids=["silent", "half a hello"])
def test_slow_handshake(tmp_path: Path, sent: bytes) -> None:
    """A TLS handshake that does not come to an end is let go."""
    own = make_certificate(tmp_path, "own")

    async def main() -> None:
        async with running(context(*own), **{"grpc.server_handshake_timeout_ms": 200}) as port:
            reader, writer = await asyncio.open_connection("localhost", port)
            writer.write(sent)
            with contextlib.suppress(ConnectionError):
                assert len(await reader.read()) < 100
            writer.close()

    run(main)
