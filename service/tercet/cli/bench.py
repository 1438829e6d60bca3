"""`tercet bench`: the command of benchmarks/load.py in a checkout."""

import sys
from pathlib import Path

import click

from tercet.cli.options import CliError, complete_models, models_option, require


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_models)
@models_option
def bench(arguments: tuple[str, ...], folder: Path) -> None:
    """Benchmark the service against baselines."""
    checkout = next((root for root in (Path.cwd(), folder.resolve().parent) if (root / "benchmarks/load.py").is_file()), None)
    if not checkout:
        raise CliError("no benchmarks/load.py here or next to --models: run `tercet bench` from a checkout of the repository")
    sys.path.append(str(checkout))
    with require("serve,bench"):
        from benchmarks import load  # noqa: PLC0415
    load.bench.main([*arguments, "--models", str(folder)], prog_name="tercet bench", standalone_mode=False)
