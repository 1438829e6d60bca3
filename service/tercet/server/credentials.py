"""Who may call and over what: TLS and bearer tokens, from files that are read again when they change."""

import hmac
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from grpc_health.v1 import health

from tercet.errors import StartupError, UnauthenticatedError
from tercet.server.config import Config
from tercet.server.rpc import abort_call

log = logging.getLogger(__name__)

T = TypeVar("T")


class Followed(Generic[T]):
    """What files hold. When they have changed they are read again; if that fails, the log says why and the old value stays."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Raise the StartupError of `read`."""
        self._paths, self._read = paths, read
        self._seen = self._look()
        self.value = read()

    def refresh(self) -> bool:
        """Whether there is a new value."""
        now = self._look()
        if now == self._seen:
            return False
        self._seen = now
        try:
            self.value = self._read()
        except StartupError as error:
            log.error("%s; what was read before stays in use", error)  # noqa: TRY400  a sentence, not a traceback
            return False
        log.info("%s read again", ", ".join(map(str, self._paths)))
        return True

    def _look(self) -> list[tuple[int, int, int] | None]:
        """Changes when a file is replaced or written to."""
        return [stamp(path) for path in self._paths]


def stamp(path: Path) -> tuple[int, int, int] | None:
    """A file's time of change, size and inode; None when there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class BearerToken(grpc.aio.ServerInterceptor):
    """Refuses calls that carry no token of a file; health checks need none."""

    def __init__(self, path: Path) -> None:
        """Raise StartupError when the file cannot be read or holds no tokens."""
        self._tokens = Followed([path], lambda: read_tokens(path))

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        """Let a call through, or end it as UNAUTHENTICATED."""
        if call.method.startswith(f"/{health.SERVICE_NAME}/") or self._knows(dict(call.invocation_metadata)):
            return await continuation(call)

        async def refuse(_request: Any, context: Any) -> None:
            await abort_call(
                context, UnauthenticatedError("send the metadata 'authorization: Bearer TOKEN' with the service's token")
            )

        return grpc.unary_unary_rpc_method_handler(refuse)

    def _knows(self, metadata: dict[str, str | bytes]) -> bool:
        """Compare with every token, so that the time taken tells nothing of any."""
        self._tokens.refresh()
        scheme, _, sent = str(metadata.get("authorization", "")).partition(" ")
        return any([hmac.compare_digest(sent.encode(), token) for token in self._tokens.value]) and scheme.lower() == "bearer"  # noqa: C419


def read_tokens(path: Path) -> list[bytes]:
    """The tokens of a file, one a line. Raises StartupError when it cannot be read or holds none."""
    try:
        tokens = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"token_file: {path} cannot be read: {error}") from error
    tokens = [token.strip() for token in tokens if token.strip()]
    if not tokens:
        raise StartupError(f"token_file: {path} is empty; it holds the tokens that callers may send, one a line")
    for number, token in enumerate(tokens, 1):
        if not token.isascii() or not token.isprintable() or " " in token:
            raise StartupError(f"token_file: {path}: token {number} cannot be sent; use printable ASCII without spaces")
    return [token.encode() for token in tokens]


def tls(config: Config) -> Any:
    """The grpc.ServerCredentials that the port is opened with; None: plain text.

    gRPC asks before each handshake for new ones, None: no change; connections that are open stay. Raises StartupError.
    """
    if config.tls_certificate is None or config.tls_key is None:
        return None
    paths = [path for path in (config.tls_certificate, config.tls_key, config.tls_client_ca) if path]
    files = Followed(paths, lambda: read_tls(*paths))
    return grpc.dynamic_ssl_server_credentials(
        files.value,
        lambda: files.value if files.refresh() else None,  # type: ignore[arg-type, return-value]
        require_client_authentication=config.tls_client_ca is not None,
    )


def read_tls(certificate: Path, key: Path, client_ca: Path | None = None) -> grpc.ServerCertificateConfiguration:
    """Read PEM files. Raises StartupError unless the key is the certificate's and all are what they should be."""
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    probing = certificate
    try:
        probe.load_cert_chain(certificate, key, password="")
        if client_ca:
            probing = client_ca
            probe.load_verify_locations(client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(key.read_bytes(), certificate.read_bytes())], client_ca.read_bytes() if client_ca else None
        )
    except ssl.SSLError as error:
        what = f"{client_ca} holds no certificates" if probing == client_ca else f"{certificate} and {key} are no pair"
        raise StartupError(f"tls: {what}: {error.reason or error}; use PEM files, the key without a password") from error
    except OSError as error:
        raise StartupError(f"tls: {error.filename or f'{probing} or its key'} cannot be read: {error.strerror}") from error
