"""What the commands of `tercet` share: options, completion, and how they end.

Errors are one sentence with a hint on stderr; the exit code says what kind, for scripts: see EXIT, and docs/cli.md.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import click
import grpc
from click.shell_completion import CompletionItem

from tercet.client import Client
from tercet.errors import StartupError
from tercet.server.config import Config

DEFAULT_SERVER = "127.0.0.1:8001"
COUNT = click.IntRange(min=1)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.option(
    "--models",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models"),
    envvar="TERCET_MODELS",
    show_default=True,
    show_envvar=True,
    help="Folder of trained models.",
)

NOT_NOW, NOT_YOU = 3, 4
EXIT = {  # what the service says -> exit code; 1 for all else
    grpc.StatusCode.UNAVAILABLE: NOT_NOW,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NOT_NOW,
    grpc.StatusCode.DEADLINE_EXCEEDED: NOT_NOW,
    grpc.StatusCode.CANCELLED: NOT_NOW,  # by a service that ends
    grpc.StatusCode.UNAUTHENTICATED: NOT_YOU,
    grpc.StatusCode.PERMISSION_DENIED: NOT_YOU,
}
INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell counts SIGINT and SIGPIPE


class Refusal(click.ClickException):
    """One sentence on stderr."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = code  # type: ignore[misc]  # click's is the class's; a status has its own here

    def show(self, file: Any = None) -> None:
        """Print the sentence."""
        click.echo(f"tercet: {self.format_message()}", file=file, err=True)


@contextmanager
def sentences() -> Iterator[None]:
    """Turn what ends a command into a sentence and an exit code."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "tercet"
        said = error.format_message()
        raise Refusal(f"{said}{'' if said.endswith(('.', ')', '?')) else '.'} Try `{command} --help`.", 2) from None
    except KeyboardInterrupt:
        raise click.exceptions.Exit(INTERRUPTED) from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the end
        if isinstance(error, BrokenPipeError):
            raise click.exceptions.Exit(PIPE_CLOSED) from None
        raise Refusal(": ".join(filter(None, (error.filename, error.strerror))) or str(error)) from None


class Tercet(click.Group):
    """A group of commands that end in sentences."""

    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        """Read the options before the command."""
        with sentences():
            return super().make_context(*arguments, **extra)

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        with sentences():
            return super().invoke(context)


def settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of Config."""
    for field in reversed(dataclasses.fields(Config)):
        kind = next((part for part in get_args(field.type) if part is not type(None)), field.type)
        flag, variable = f"--{field.name.replace('_', '-')}", f"TERCET_{field.name.upper()}"
        add = click.option(
            flag,
            type=kind,
            is_flag=kind is bool,
            default=field.default,
            envvar=variable,
            show_default=True,
            show_envvar=True,
            help=field.metadata["help"],
        )
        command = add(command)
    return command


def calls(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a client, hand it a Client, and turn a failed call into a sentence."""

    @click.option("--server", default=DEFAULT_SERVER, envvar="TERCET_SERVER", show_default=True, show_envvar=True, help="host:port")
    @click.option("--token", envvar="TERCET_TOKEN", show_envvar=True, help="Bearer token, when the service wants one.")
    @click.option("--tls-ca", type=FILE, envvar="TERCET_TLS_CA", show_envvar=True, help="PEM: whom to trust; calls with TLS.")
    @click.option("--tls-certificate", type=FILE, envvar="TERCET_CLIENT_CERTIFICATE", show_envvar=True, help="PEM, for mTLS.")
    @click.option("--tls-key", type=FILE, envvar="TERCET_CLIENT_KEY", show_envvar=True, help="PEM, for mTLS.")
    def calling(
        server: str, token: str | None, tls_ca: Path | None, tls_certificate: Path | None, tls_key: Path | None, **options: Any
    ) -> None:
        try:
            opened = Client(server, token=token, tls_ca=tls_ca, tls_certificate=tls_certificate, tls_key=tls_key)
        except ValueError as error:
            raise Refusal(f"{error}: --tls-ca, --tls-certificate, --tls-key") from None
        try:
            with opened as client:
                command(client=client, **options)
        except grpc.RpcError as error:
            raise Refusal(reason(server, error), EXIT.get(error.code(), 1)) from None

    calling.__doc__ = command.__doc__
    calling.__name__ = command.__name__
    calling.__click_params__ = [*getattr(command, "__click_params__", []), *calling.__click_params__]  # type: ignore[attr-defined]
    return calling


def reason(server: str, error: grpc.RpcError) -> str:
    """Why a call failed, and what to do."""
    details = error.details() or ""
    if "Connection refused" in details:
        return f"nothing listens at {server}; start a service with `tercet serve`, or name another with --server"
    if any(text in details for text in ("failed to connect", "DNS resolution failed", "errors resolving")):
        return f"{server} cannot be reached: {details}; check --server and --tls-ca"
    return f"the service at {server} says {error.code().name}: {details}"


def complete_models(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of models that begin so, in the folder of this command or of TERCET_MODELS."""
    with suppress(ImportError, StartupError):
        from tercet.card import find_models  # noqa: PLC0415  only here

        folder = context.params.get("folder") or os.environ.get("TERCET_MODELS", "models")
        return [name for name in find_models(Path(folder)) if name.startswith(incomplete)]
    return []


def complete_values(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files, where pictures are asked for."""
    return [CompletionItem(incomplete, type="file")] if context.params.get("model") == "mnist" else []
