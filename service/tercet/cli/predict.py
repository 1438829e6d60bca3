"""`tercet predict`."""

from io import BufferedReader

import click

import tercet  # noqa: TC001  lazy
from tercet.cli.options import client_options, complete_models, complete_values, server_option


@click.command(context_settings={"ignore_unknown_options": True})  # values may be negative
@server_option
@client_options
@click.argument("model", shell_complete=complete_models)
@click.argument("values", nargs=-1, shell_complete=complete_values)
@click.option("--input", "file", type=click.File("rb"), help="Read input from this file, `-` for stdin.")
@click.option("--format", "form", type=click.Choice(["csv", "jsonl", "lines"]), help="Format of --input; default: by its suffix.")
@click.option("--output", type=click.Choice(["text", "json", "csv"]), default="text", show_default=True, help="Output format.")
@click.option("--json", "output", flag_value="json", help="Short for --output json.")
@click.option("--draw", is_flag=True, help="Draw each digit in the terminal, with all probabilities.")
def predict(
    client: "tercet.Client",
    model: str,
    values: tuple[str, ...],
    file: BufferedReader | None,
    form: str | None,
    output: str,
    *,
    draw: bool,
) -> None:
    """Ask the service for predictions.

    VALUES are files or quoted patterns for mnist (`-`: a picture on stdin), NAME=VALUE or all eight measurements for diabetes (`-`:
    not measured), numbers for fizzbuzz, and a JSON list of rows for any other model. --input reads a file of any length: per line
    the same as above, a CSV row below a header of names, or a JSON value.

    \b
    Examples:
      tercet predict mnist seven.png 'digits/**/*.png' --draw
      tercet predict mnist - < seven.png
      tercet predict diabetes glucose=148 bmi=33.6 age=50
      tercet predict diabetes 6 148 72 35 - 33.6 0.627 50 --json
      tercet predict diabetes --input patients.csv --output csv
      seq 1 100 | tercet predict fizzbuzz --input -
      tercet predict fizzbuzz_any '[7, -15]'
    """  # noqa: D301
    from tercet.cli.records import find_adapter, predict_all, print_predictions, read_records  # noqa: PLC0415  --help does without

    if bool(values) == bool(file):
        raise click.UsageError("Give either values or --input FILE.")
    for value in values:
        if value.startswith("--"):
            raise click.NoSuchOption(value, possibilities=[name for option in predict.params for name in option.opts])
    if draw and (output != "text" or model != "mnist"):
        raise click.UsageError("--draw is for pictures of mnist, as text.")
    adapter = find_adapter(client, model)
    predictions = predict_all(client, adapter, read_records(adapter, values, file, form))
    print_predictions(adapter, predictions, output, draw=draw)
