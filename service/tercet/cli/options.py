"""What the commands share: their options, and errors as one-line messages with an exit code."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

import tercet

DEFAULT_SERVER = "127.0.0.1:8001"
EXIT_RETRY, EXIT_AUTH, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 3, 4, 130, 141  # the last two as a shell reports SIGINT and SIGPIPE
EXIT_CODES = {  # by gRPC status; 1 for all others
    **dict.fromkeys(("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"), EXIT_RETRY),
    **dict.fromkeys(("UNAUTHENTICATED", "PERMISSION_DENIED"), EXIT_AUTH),
}
COUNT = click.IntRange(min=1)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
option = partial(click.option, show_default=True, show_envvar=True)
models_option = option(
    "--models", "folder", type=FOLDER, default="models", envvar="TERCET_MODELS", help="Folder of trained models."
)
server_option = option("--server", default=DEFAULT_SERVER, envvar="TERCET_SERVER", metavar="HOST:PORT")


class CliError(click.ClickException):
    """An error that is shown as one line on stderr."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # a class variable in click

    def show(self, file: Any = None) -> None:
        click.echo(f"tercet: {self.format_message()}", file=file, err=True)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn whatever ends a command into a message and an exit code."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        message, command = error.format_message(), error.ctx.command_path if error.ctx else "tercet"
        raise CliError(f"{message}{'' if message.endswith(('.', ')', '?')) else '.'} Try `{command} --help`.", 2) from None
    except (click.ClickException, click.exceptions.Exit):
        raise
    except KeyboardInterrupt:
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit does not fail again
        if isinstance(error, BrokenPipeError):
            raise click.exceptions.Exit(EXIT_PIPE_CLOSED) from None
        raise CliError(": ".join(filter(None, (error.filename, error.strerror))) or str(error)) from None
    except Exception as error:
        from tercet.errors import StartupError  # noqa: PLC0415  imports grpc

        if isinstance(error, StartupError):
            raise CliError(str(error)) from None
        raise


@contextmanager
def require(extra: str) -> Iterator[None]:
    """Turn a failed import into advice on which extra to install."""
    try:
        yield
    except ImportError as error:
        command = click.get_current_context().command_path
        raise CliError(f"`{command}` needs more packages: pip install '.[{extra}]' ({error})") from None


def unknown_model(name: str, names: Sequence[str]) -> CliError:
    from difflib import get_close_matches  # noqa: PLC0415  only for this error

    close = get_close_matches(name, names, 1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Expected one of: {', '.join(names) or 'none is there'}."
    return CliError(f"No model {name!r}. {hint}")


def client_options(command: Callable[..., None], *, timeout: float = 30.0) -> Callable[..., None]:
    """Give a command the options of a client, pass it the client, and turn a failed call into a message."""

    @option("--token", envvar="TERCET_TOKEN", help="Bearer token, if the service requires one.")
    @option("--tls-ca", type=FILE, envvar="TERCET_TLS_CA", help="PEM file of trusted CAs; enables TLS.")
    @option("--tls-certificate", type=FILE, envvar="TERCET_CLIENT_CERTIFICATE", help="PEM file, for mTLS.")
    @option("--tls-key", type=FILE, envvar="TERCET_CLIENT_KEY", help="PEM file, for mTLS.")
    @wraps(command)
    def run(*, server: str, **options: Any) -> None:
        from grpc import RpcError  # noqa: PLC0415  takes long to import, and --help does without

        if ":" not in server:
            raise click.BadParameter(f"expected HOST:PORT, got {server!r}", param_hint="--server")
        credentials = {name: options.pop(name) for name in ("token", "tls_ca", "tls_certificate", "tls_key")}
        try:
            client = tercet.Client(server, timeout=timeout, **credentials)
        except ValueError as error:
            raise click.UsageError(f"{error}: --tls-ca, --tls-certificate, --tls-key") from None
        try:
            with client:
                command(client=client, **options)
        except RpcError as error:
            raise CliError(explain(server, error), EXIT_CODES.get(error.code().name, 1)) from None

    return run


def explain(server: str, error: Any) -> str:
    """Why a call failed, and what to do about it."""
    details = error.details() or ""
    if "Connection refused" in details:
        return f"nothing listens at {server}; start a service with `tercet serve`, or name another one with --server"
    if any(text in details for text in ("failed to connect", "DNS resolution failed", "errors resolving")):
        return f"cannot reach {server}: {details}; check --server and --tls-ca"
    return f"the service at {server} returned {error.code().name}: {details}"


def complete_models(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Trained models in the folder of this command or of TERCET_MODELS."""
    folder = Path(context.params.get("folder") or os.environ.get("TERCET_MODELS", "models"))
    return sorted(path.parent.name for path in folder.glob(f"{incomplete}*/card.json"))


def complete_values(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files for a model that takes pictures."""
    return [CompletionItem(incomplete, type="file")] if context.params.get("model") == "mnist" else []
