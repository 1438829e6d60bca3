"""The command `tercet`: a group whose commands, one module each, are imported when they run."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from tercet.cli.options import CliError, errors_as_messages, require

COMMANDS = {
    "bench": "Benchmark the service against baselines.",
    "demo": "Try the models on a web page.",
    "export-triton": "Write a model repository for NVIDIA Triton.",
    "fizzbuzz": "Count from START to STOP, both included.",
    "health": "Health probe for containers and init systems.",
    "models": "List the models, or describe one.",
    "predict": "Ask the service for predictions.",
    "serve": "Serve the trained models until SIGTERM or Ctrl-C.",
    "sign": "Sign models for `serve --require-signed`.",
}
CHECKOUT_COMMANDS = {"bench": "benchmarks.load", "export-triton": "deploy.triton.export"}  # run from a checkout, not installed


def load(name: str) -> click.Command:
    """Import a command. Raises CliError for one of CHECKOUT_COMMANDS when the current folder is not a checkout."""
    module = CHECKOUT_COMMANDS.get(name, f"tercet.cli.{name}")
    if name in CHECKOUT_COMMANDS:
        if not Path(f"{module.replace('.', '/')}.py").is_file():
            raise CliError(f"run `tercet {name}` in a checkout of the repository: there is no {module.replace('.', '/')}.py here")
        sys.path.append(str(Path.cwd()))
    with require("serve,bench"):
        command: click.Command = getattr(import_module(module), name.replace("-", "_"))
    return command


class LazyGroup(click.Group):
    """Help and completion need only names and summaries of commands, so a command is imported when it runs."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load(name or ""), rest

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with errors_as_messages():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with errors_as_messages():
            return super().invoke(ctx)


@click.group(
    cls=LazyGroup,
    commands=[click.Command(name, short_help=summary) for name, summary in COMMANDS.items()],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="tercet", prog_name="tercet")
def main() -> None:
    """Small models behind one gRPC service.

    \b
    Examples:
      tercet serve
      tercet predict mnist 'digits/*.png' --draw
      tercet predict diabetes --input patients.csv --output csv
      tercet fizzbuzz 1 100

    \b
    Exit codes:
      0    success
      1    invalid input, or the request failed; see the error on stderr
      2    wrong command line
      3    service unreachable or busy: try again later
      4    credentials missing or rejected: see --token and --tls-*
      130  interrupted with Ctrl-C
      141  output pipe closed, as with `tercet ... | head`

    Client options can also be set with TERCET_SERVER, TERCET_TOKEN and so on; see each command's --help.
    """  # noqa: D301  \b keeps click from rewrapping a paragraph
