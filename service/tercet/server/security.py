"""Who may call, over what, and which models are trusted: TLS, bearer tokens, and ed25519 signatures of model cards (RFC 8032)."""

import hmac
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import grpc
from grpc_health.v1 import health

from tercet.card import SIGNATURE, fingerprint, read_card, verify_file
from tercet.errors import StartupError, UnauthenticatedError
from tercet.server.config import Config
from tercet.server.rpc import abort_call

log = logging.getLogger(__name__)

T = TypeVar("T")


class ReloadingFile(Generic[T]):
    """A value parsed from files. Files that change are parsed again; when that fails, the last good value stays."""

    def __init__(self, parse: Callable[..., T], *paths: Path) -> None:
        """`parse` gets the paths, and raises StartupError."""
        self._parse, self._paths = parse, paths
        self._fingerprint = fingerprint(paths)
        self.value = parse(*paths)

    def refresh(self) -> T | None:
        """Parse the files again if they have changed. Returns the new value, if there is one."""
        previous, self._fingerprint = self._fingerprint, fingerprint(self._paths)
        if self._fingerprint == previous:
            return None
        try:
            self.value = self._parse(*self._paths)
        except StartupError as error:
            log.error("%s; the previous value stays in use", error)  # noqa: TRY400  the operator needs no traceback
            return None
        log.info("reloaded %s", ", ".join(map(str, self._paths)))
        return self.value


class BearerTokens(grpc.aio.ServerInterceptor):
    """Refuses calls without a valid token; health checks need none."""

    def __init__(self, path: Path) -> None:
        """Read the tokens of a file, one per line. Raises StartupError when it cannot be read or has none."""
        self._tokens = ReloadingFile(_read_tokens, path)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        if call.method.startswith(f"/{health.SERVICE_NAME}/") or self._is_valid(dict(call.invocation_metadata)):
            return await continuation(call)

        async def refuse(_request: Any, context: Any) -> None:
            error = UnauthenticatedError("expected the metadata 'authorization: Bearer TOKEN' with a token of this service")
            await abort_call(context, error)

        return grpc.unary_unary_rpc_method_handler(refuse)

    def _is_valid(self, metadata: dict[str, str | bytes]) -> bool:
        """Compare with every token, so that the time reveals nothing about any of them."""
        self._tokens.refresh()
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        return any([hmac.compare_digest(token.encode(), each) for each in self._tokens.value]) and scheme.lower() == "bearer"  # noqa: C419


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from error


def _read_tokens(path: Path) -> list[bytes]:
    tokens = [line.strip() for line in _read(path).split(b"\n") if line.strip()]
    if not tokens or not all(re.fullmatch(rb"[!-~]+", token) for token in tokens):
        raise StartupError(f"{path} must have one token per line, each of printable ASCII characters without spaces")
    return tokens


def reserve_port(config: Config) -> socket.socket:
    """A socket that keeps the port, or a free one for 0, for processes that share it; it does not listen.

    Raises StartupError when it is taken or not of this machine, or when other machines could call it in plain text.
    """
    try:
        addresses = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        if not (config.tls_key or config.insecure or all(ip_address(address[4][0]).is_loopback for address in addresses)):
            raise StartupError(
                f"other machines can reach {config.host}, and calls would be plain text: set --tls-certificate and --tls-key, or "
                "--insecure if a proxy or mesh encrypts them"
            )
        family, _, _, _, address = addresses[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)  # fails when another process listens, even one that shares the port
            address = probe.getsockname()
        reserved = socket.socket(family)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
    except OSError as error:
        raise StartupError(f"cannot listen on {config.address}: {error.strerror}; choose another port with --port") from error
    return reserved


def tls_files(config: Config) -> "ReloadingFile[TlsFiles] | None":
    """The certificate, key and client CAs of the port; None for plain text. Raises StartupError when they do not fit together."""
    paths = [path for path in (config.tls_certificate, config.tls_key, config.tls_client_ca) if path]
    return ReloadingFile(_read_tls_files, *paths) if paths else None


class TlsFiles(NamedTuple):
    """The same files, for OpenSSL and for gRPC."""

    context: ssl.SSLContext
    configuration: grpc.ServerCertificateConfiguration


def tls_credentials(config: Config) -> grpc.ServerCredentials:
    """The credentials to open a port of grpc.aio with, insecure ones for plain text. Raises StartupError as `tls_files` does.

    gRPC asks for new ones before each handshake; open connections stay.
    """
    if (files := tls_files(config)) is None:
        return grpc.insecure_server_credentials()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        return value.configuration if (value := files.refresh()) else None

    mutual = config.tls_client_ca is not None
    return grpc.dynamic_ssl_server_credentials(files.value.configuration, renewed, require_client_authentication=mutual)  # type: ignore[arg-type]


def _read_tls_files(certificate: Path, key: Path, client_ca: Path | None = None) -> TlsFiles:
    """Read PEM files; check them with OpenSSL, as gRPC reports nothing useful."""
    pair, authorities = (_read(key), _read(certificate)), _read(client_ca) if client_ca else None
    context, problem = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), f"{certificate} and {key} are not a pair"
    try:
        context.load_cert_chain(certificate, key, password="")
        if client_ca:
            problem = f"{client_ca} has no certificates"
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise StartupError(f"TLS: {problem}: {error}; use PEM files, the key without a password") from error
    return TlsFiles(context, grpc.ssl_server_certificate_configuration([pair], authorities))


def sign_model(folder: Path, key: Path) -> Path:
    """Sign card.json, which has the hashes of the other files, with a private key. Returns the file with the signature, 64 bytes.

    Raises StartupError when a file differs from the card, or the key is not a private ed25519 key.
    """
    card = read_card(folder)
    for name in card.files:
        verify_file(folder, card, name)
    path = folder / SIGNATURE
    path.write_bytes(_read_key(key, "private").sign(_read(folder / "card.json")))
    return path


def check_signature(content: bytes, folder: Path, key: Path) -> None:
    """Raise StartupError unless a folder's signature says that the owner of the public key signed `content` as its card.json."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  only signatures need cryptography

    path = folder / SIGNATURE
    try:
        _read_key(key, "public").verify(path.read_bytes() if path.exists() else b"", content)
    except InvalidSignature:
        raise StartupError(f"{path} is missing, or not a signature of this card.json by the owner of {key}") from None


def _read_key(path: Path, kind: Literal["private", "public"]) -> Any:
    """Read an ed25519 key. Raises StartupError."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  only signatures need cryptography
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key  # noqa: PLC0415

    content, key = _read(path), None
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):
        key = load_pem_private_key(content, None) if kind == "private" else load_pem_public_key(content)
    if not isinstance(key, ed25519.Ed25519PrivateKey if kind == "private" else ed25519.Ed25519PublicKey):
        raise StartupError(f"{path} is not a {kind} ed25519 key, in PEM format and without a password")
    return key
