"""The input and output of `tercet predict`: text -> records -> rows of a client's codec, and predictions in the same order.

A record is one argument, line or CSV row. Nothing is read before it is needed, so input may be of any length. The first record that
is wrong ends it: the ones before are predicted, and the error names its place.
"""

import csv
import glob
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc

from tercet.cli.options import CliError, require, unknown_model
from tercet.client import MEASUREMENTS, Client

BLOCK = 2**16  # bytes that are read from a file at once
FORMATS = {".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl"}  # by suffix; lines for any other
TOO_LARGE = "Received message larger than max"  # gRPC's text; a row that large is sent alone

Fields = dict[str, Any]  # what is printed for a record


class Record(NamedTuple):
    place: str  # in the input, for errors
    row: Any  # as the codec takes it
    echo: Fields  # repeated in the output
    last_ready: bool = False  # the next one has not arrived yet: predict before reading on


class Adapter(NamedTuple):
    """How the words of a command line become rows of a model, and its predictions become text."""

    field: str  # of the request: the one that holds the rows
    predict: Callable[[Client, Iterable[Any]], Iterator[Fields]]
    text: Callable[[Fields], str]
    parse: Callable[[Any], tuple[Any, Fields]]  # record -> row, and what the output repeats; raises ValueError
    split: Callable[[Sequence[str]], Iterable[Any]] = iter  # arguments -> records; raises ValueError
    notice: str = ""  # shown once with the predictions


def find_adapter(client: Client, model: str) -> Adapter:
    """The adapter of a typed service, or one for JSON and tensors. Raises CliError for a model that the service does not know."""
    if model in ADAPTERS:
        return ADAPTERS[model]
    if model not in (names := client.models()):
        raise unknown_model(model, names)
    return Adapter(
        field="inputs[0]",
        predict=lambda client, rows: ({"output": output.tolist()} for output in client.infer_each(model, rows)),
        text=lambda fields: " ".join(f"{value:.4g}" for value in flatten(fields["output"])),
        parse=parse_json,
        split=split_json,
    )


def split_json(arguments: Sequence[str]) -> list[Any]:
    rows = from_json(" ".join(arguments))
    if not isinstance(rows, list):
        raise ValueError(f"expected a JSON list of rows, for example '[15]', got {rows!r}")  # noqa: TRY004  see Adapter
    return rows


def parse_json(record: Any) -> tuple[Any, Fields]:
    if isinstance(record, Mapping):
        raise ValueError("expected a row such as [0.5, 1.0] per line, got named columns")  # noqa: TRY004
    return record, {}


def find_files(pattern: str) -> list[str]:
    """The sorted files that a pattern matches, `**` at any depth; without wildcards the name itself."""
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [pattern]
    files = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())  # noqa: PTH207  as in a shell
    if not files:
        raise ValueError(f"no file matches {pattern!r}")
    return files


def parse_picture(record: Any) -> tuple[bytes, Fields]:
    path = str(column(record, "file"))
    try:
        with click.open_file(path, "rb") as file:
            return file.read(), {"file": path}
    except OSError as error:
        reason = f"cannot read {path}: {error.strerror}"
        raise ValueError(f"{reason}; expected PNG or JPEG files, or a pattern such as 'digits/*.png'") from None


def parse_patient(record: Any) -> tuple[dict[str, float | None], Fields]:
    """A patient from NAME=VALUE words, all values in order, or named columns. Names may be shortened; `-` is not measured."""
    echo, patient = Fields(), dict[str, float | None]()
    for name, value in named_values(record):
        matches = [full for full in MEASUREMENTS if full.startswith(name.strip())]
        if isinstance(record, Mapping) and name == "id":
            echo["id"] = value
        elif len(matches) != 1:
            raise ValueError(f"unknown measurement {name!r}; expected one of {', '.join(MEASUREMENTS)}, or the beginning of one")
        elif matches[0] in patient:
            raise ValueError(f"{matches[0]} is given twice")
        else:
            patient[matches[0]] = None if value in ("-", "", None) else number(value, float, f"{name}: ")
    return patient, echo


def named_values(record: Any) -> Iterable[Sequence[Any]]:
    if isinstance(record, Mapping):
        return record.items()
    values = record.split() if isinstance(record, str) else record if isinstance(record, list | tuple) else [record]
    if any("=" in str(value) for value in values):
        return [str(value).partition("=")[::2] for value in values]
    if len(values) != len(MEASUREMENTS):
        order = " ".join(MEASUREMENTS)
        raise ValueError(f"expected NAME=VALUE or {len(MEASUREMENTS)} values in the order {order}, got {len(values)} values")
    return zip(MEASUREMENTS, values, strict=True)


def parse_number(record: Any) -> tuple[int, Fields]:
    value = number(column(record, "number"), int)
    return value, {"number": value}


def column(record: Any, name: str) -> Any:
    """The named column of a record, or the record itself when it has no columns."""
    if isinstance(record, Mapping) and name not in record:
        raise ValueError(f"expected a column {name!r}, got {', '.join(map(repr, record))}")
    return record[name] if isinstance(record, Mapping) else record


def number(value: Any, kind: Callable[[str], Any], where: str = "") -> Any:
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError(f"{where}expected {'a number' if kind is float else 'a 64-bit integer'}, got {value!r}") from None


def from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected JSON, got {text[:40]!r}: {error}") from None


def join(*parts: str | None) -> str:
    return ": ".join(filter(None, parts))


ADAPTERS = {
    "mnist": Adapter(
        field="images",
        predict=lambda client, rows: (digit._asdict() for digit in client.classify_each(rows)),
        text=lambda fields: f"{fields['file']}: {fields['digit']} ({max(fields['probabilities']):.1%})",
        parse=parse_picture,
        split=lambda arguments: chain.from_iterable(map(find_files, arguments)),
    ),
    "diabetes": Adapter(
        field="patients",
        predict=lambda client, rows: (assessment._asdict() for assessment in client.assess_each(rows)),
        text=lambda fields: join(
            fields.get("id"), f"{fields['probability']:.1%} probability of a positive test ({fields['label']})"
        ),
        parse=parse_patient,
        split=lambda arguments: [arguments],
        notice="for teaching and benchmarking only, not for medical decisions",
    ),
    "fizzbuzz": Adapter(
        field="numbers",
        predict=lambda client, rows: ({"word": word} for word in client.answer_each(rows)),
        text=lambda fields: str(fields["word"]),
        parse=parse_number,
    ),
}


class Lines:
    """The lines of a file. `number` is that of the latest, from 1; `last_ready` says that the next one has not arrived yet."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self.name, self.number, self.last_ready = file, str(file.name).strip("<>"), 0, False

    def __iter__(self) -> Iterator[str]:
        rest = b""
        while block := self._file.read1(BLOCK):  # returns what has arrived
            *lines, rest = (rest + block).split(b"\n")
            for i, line in enumerate(lines, 1):
                self.number, self.last_ready = self.number + 1, i == len(lines)
                yield f"{line.decode('utf-8-sig')}\n"
        if rest:
            self.number += 1
            yield rest.decode("utf-8-sig")


def from_csv(lines: Iterable[str]) -> Iterator[Fields]:
    """Rows by the columns of the header. Raises ValueError and csv.Error."""
    reader = csv.DictReader(lines, strict=True)
    names = reader.fieldnames or []
    if len({*names}) < len(names):
        raise ValueError("two columns have the same name")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"expected {len(names)} columns, as in the header")
        yield row


def read_records(adapter: Adapter, arguments: Sequence[str], file: BufferedReader | None, kind: str | None) -> Iterator[Record]:
    """The records in the arguments, or in a file: csv, jsonl or lines. Raises CliError, which names the line."""
    lines = Lines(file) if file else None

    def records() -> Iterable[Any]:
        if not lines:
            return adapter.split(arguments)
        form = kind or FORMATS.get(Path(lines.name).suffix.lower(), "lines")
        if form == "csv":
            return from_csv(lines)
        texts = filter(None, map(str.strip, lines))
        return map(from_json, texts) if form == "jsonl" or adapter.parse is parse_json else texts

    def place() -> str:
        return f"{lines.name}, line {lines.number}" if lines else ""

    try:
        for record in records():
            row, echo = adapter.parse(record)
            yield Record(join(place(), echo.get("file")), row, echo, bool(lines and lines.last_ready))
    except (ValueError, csv.Error) as error:
        reason = "expected text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise CliError(join(place(), reason)) from None


def predict_all(client: Client, adapter: Adapter, records: Iterator[Record]) -> Iterator[tuple[Record, Fields]]:
    """Predict any number of records, in order; those that have arrived are predicted before more input is awaited.

    When one is rejected, those before it are predicted first. Then the next stream starts with it: the record may have been one too
    many for its request. It is wrong if it is rejected as the first one. Raises CliError for a wrong record, and grpc.RpcError.
    """
    pending = deque[Record]()  # read, and not predicted yet
    wrong: CliError | None = None

    def rows(count: int | None) -> Iterator[Any]:
        """The first `count` pending rows; without a count all, and those that have arrived."""
        ready = [*pending][:count] if count or pending[-1].last_ready else chain([*pending], read_ready(records, pending))
        return (record.row for record in ready)

    for first in records:
        pending.append(first)
        count = None  # of rows before one that was rejected
        while pending:
            done = 0
            try:
                for fields in adapter.predict(client, rows(count)):
                    record = pending.popleft()
                    done += 1
                    yield record, {**record.echo, **fields}
                count = None
            except CliError as error:  # by the input, which has ended
                wrong, count = error, len(pending)
            except (ValueError, TypeError, grpc.RpcError) as error:  # by the codec or the service
                row, details = locate(error, adapter.field)
                count = row - done
                if count <= 0:
                    raise CliError(join(pending[0].place, details)) from None
    if wrong:
        raise wrong


def read_ready(records: Iterator[Record], pending: deque[Record]) -> Iterator[Record]:
    """The records that have arrived; each is also appended to `pending`."""
    for record in records:
        pending.append(record)
        yield record
        if record.last_ready:
            return


def locate(error: Any, field: str) -> tuple[int, str]:
    """The index of the row that an error names, and what is wrong with it. Raises the error of a call that names none."""
    details = str(error.details() if isinstance(error, grpc.RpcError) else error)
    if match := re.match(rf"{re.escape(field)}\[(\d+)\]\S*: ", details):
        return int(match[1]), details[match.end() :]
    if TOO_LARGE in details:
        return 0, details[details.index(TOO_LARGE) :]
    raise error if isinstance(error, grpc.RpcError) else CliError(details)


def print_predictions(adapter: Adapter, predictions: Iterator[tuple[Record, Fields]], output: str, *, draw: bool) -> None:
    """Print predictions as text, as JSON objects or as CSV; with `draw` each picture below its line."""
    if output == "csv":
        print_csv(fields for _, fields in predictions)
        return
    for i, (record, fields) in enumerate(predictions):
        if output == "text" and adapter.notice and i == 0:
            click.echo(f"tercet: {adapter.notice}", err=True)
        click.echo(json.dumps(fields) if output == "json" else adapter.text(fields))
        if draw:
            from tercet.cli.render import show_digit  # noqa: PLC0415  imports rich

            with require("serve"):
                from tercet.server.images import decode_image  # noqa: PLC0415  needs Pillow
            click.echo(show_digit(decode_image(record.row, record.place), fields["probabilities"]))


def print_csv(predictions: Iterable[Fields]) -> None:
    """Print a header and a line per prediction; a list becomes columns `name_0`, `name_1` and so on."""
    writer = None
    for fields in predictions:
        row = Fields()
        for name, value in fields.items():
            row |= {f"{name}_{i}": part for i, part in enumerate(flatten(value))} if isinstance(value, list) else {name: value}
        if not writer:
            writer = csv.DictWriter(sys.stdout, row, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


def flatten(value: Any) -> list[Any]:
    """The values of a nested list, in order."""
    return [leaf for part in value for leaf in flatten(part)] if isinstance(value, list) else [value]
