"""Who may call, over what, and which models are trusted: TLS, bearer tokens, and ed25519 signatures of model cards (RFC 8032)."""

import hmac
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

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

    def __init__(self, paths: Sequence[Path], parse: Callable[[], T]) -> None:
        """Raise the StartupError of `parse`."""
        self._paths, self._parse = paths, parse
        self._fingerprint = fingerprint(paths)
        self.value = parse()

    def refresh(self) -> bool:
        """Look at the files. Returns whether there is a new value."""
        current = fingerprint(self._paths)
        if current == self._fingerprint:
            return False
        self._fingerprint = current
        try:
            self.value = self._parse()
        except StartupError as error:
            log.error("%s; the previous value stays in use", error)  # noqa: TRY400  the operator needs no traceback
            return False
        log.info("reloaded %s", ", ".join(map(str, self._paths)))
        return True


class BearerTokens(grpc.aio.ServerInterceptor):
    """Refuses calls without a valid token; health checks need none."""

    def __init__(self, path: Path) -> None:
        """Read the tokens of a file, one per line. Raises StartupError when it cannot be read or has none."""
        self._tokens = ReloadingFile([path], lambda: _read_tokens(path))

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


def _read_tokens(path: Path) -> list[bytes]:
    try:
        tokens = [line.strip() for line in path.read_text().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--token-file: {path} cannot be read: {error}") from error
    if not tokens:
        raise StartupError(f"--token-file: {path} is empty; expected one token per line")
    for number, token in enumerate(tokens, 1):
        if not token.isascii() or not token.isprintable() or " " in token:
            raise StartupError(f"--token-file: {path}: token {number} must be printable ASCII without spaces")
    return [token.encode() for token in tokens]


def check_address(config: Config) -> tuple[socket.AddressFamily, Any]:
    """The address to listen on, with a free port in place of 0.

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
            return family, probe.getsockname()
    except OSError as error:
        hint = "choose another with --port, or 0 for a free one"
        raise StartupError(f"cannot listen on {config.address}: {str(error.strerror).lower()}; {hint}") from error


def reserve_port(config: Config) -> socket.socket:
    """A socket that keeps the port for processes that share it, and does not listen. Raises as `check_address` does."""
    family, address = check_address(config)
    reserved = socket.socket(family)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(address)
    return reserved


def tls_credentials(config: Config) -> grpc.ServerCredentials | None:
    """The credentials to open the port with; None for plain text. Raises StartupError when the files do not fit together.

    gRPC asks for new ones before each handshake; open connections stay.
    """
    if config.tls_certificate is None or config.tls_key is None:
        return None
    paths = [path for path in (config.tls_certificate, config.tls_key, config.tls_client_ca) if path]
    files = ReloadingFile(paths, lambda: _read_tls_files(*paths))
    return grpc.dynamic_ssl_server_credentials(
        files.value,
        lambda: files.value if files.refresh() else None,  # type: ignore[arg-type, return-value]  # None: no change
        require_client_authentication=config.tls_client_ca is not None,
    )


def _read_tls_files(certificate: Path, key: Path, client_ca: Path | None = None) -> grpc.ServerCertificateConfiguration:
    """Read PEM files; check them with OpenSSL, as gRPC reports nothing useful."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files, problem = f"{certificate} and {key}", "are not a pair"
    try:
        context.load_cert_chain(certificate, key, password="")
        if client_ca:
            files, problem = str(client_ca), "has no certificates"
            context.load_verify_locations(client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(key.read_bytes(), certificate.read_bytes())], client_ca.read_bytes() if client_ca else None
        )
    except ssl.SSLError as error:
        raise StartupError(f"TLS: {files} {problem}: {error.reason or error}; use PEM files, the key without a password") from error
    except OSError as error:
        raise StartupError(f"TLS: {error.filename or files} cannot be read: {error.strerror}") from error


def sign_model(folder: Path, key: Path) -> Path:
    """Sign card.json, which has the hashes of the other files, with a private key. Returns the file with the signature, 64 bytes.

    Raises StartupError when a file differs from the card, or the key is not a private ed25519 key.
    """
    card = read_card(folder)
    for name in card.files:
        verify_file(folder, card, name)
    path = folder / SIGNATURE
    path.write_bytes(_read_key(key, "private").sign((folder / "card.json").read_bytes()))
    return path


def check_signature(content: bytes, folder: Path, key: Path) -> None:
    """Raise StartupError unless a folder's signature says that the owner of the public key signed `content` as its card.json."""
    public, path = _read_key(key, "public"), folder / SIGNATURE
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  only signatures need cryptography

    try:
        public.verify(path.read_bytes(), content)
    except OSError:
        raise StartupError(f"{path} cannot be read; --require-signed needs it: run `tercet sign {folder}`") from None
    except InvalidSignature:
        raise StartupError(f"{path} is not a signature of this card.json by the owner of {key}") from None


def _read_key(path: Path, kind: Literal["private", "public"]) -> Any:
    """Read an ed25519 key. Raises StartupError."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  only signatures need cryptography
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    except ImportError as error:
        raise StartupError(f"signatures need cryptography: pip install '.[serve]' ({error})") from error
    key: object = None
    try:
        content = path.read_bytes()
        key = serialization.load_pem_private_key(content, None) if kind == "private" else serialization.load_pem_public_key(content)
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass  # reported below
    if not isinstance(key, ed25519.Ed25519PrivateKey if kind == "private" else ed25519.Ed25519PublicKey):
        hint = {"private": "openssl genpkey -algorithm ed25519", "public": "openssl pkey -in private.pem -pubout"}[kind]
        raise StartupError(f"{path} is not a {kind} ed25519 key, in PEM format and without a password: `{hint}` writes one")
    return key
