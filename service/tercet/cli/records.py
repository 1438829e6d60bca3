"""The input and output of `tercet predict`: text -> records -> rows of a client's codec, and predictions in the same order.

A record is one argument, line or CSV row. Nothing is read before it is needed, so input may be of any length. The first record that
is wrong ends it: the ones before are predicted, and the error names its place.
"""

import csv
import glob
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc

from tercet.cli.options import CliError, require, unknown_model
from tercet.client import MEASUREMENTS, Client

READ_BYTES = 2**16  # of a file at once
FORMATS = {".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl"}  # by suffix; lines for any other
TOO_LARGE = "Received message larger than max"  # gRPC's text

Fields = dict[str, Any]  # what is printed for a record


class Record(NamedTuple):
    place: str  # in the input, for errors
    row: Any  # as the codec takes it
    echo: Fields  # repeated in the output


class Adapter(NamedTuple):
    """How the words of a command line become rows of a model, and its predictions become text."""

    field: str  # of the request: the one that holds the rows
    predict: Callable[[Client, list[Any]], Iterable[Fields]]
    text: Callable[[Fields], str]
    parse: Callable[[Any], tuple[Any, Fields]]  # record -> row, and what the output repeats; raises ValueError
    split: Callable[[Sequence[str]], Iterable[Any]] = iter  # arguments -> records; raises ValueError
    batch: int = 1024  # rows that are read before they are predicted
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
        parse=parse_tensor,
        split=split_json,
    )


def split_json(arguments: Sequence[str]) -> list[Any]:
    if isinstance(rows := from_json(" ".join(arguments)), list):
        return rows
    raise ValueError(f"expected a JSON list of rows, for example '[15]', got {rows!r}")


def parse_tensor(record: Any) -> tuple[Any, Fields]:
    if isinstance(record, Mapping):
        raise ValueError("expected a row such as [0.5, 1.0] per line, got named columns")  # noqa: TRY004  see Adapter
    return from_json(record) if isinstance(record, str) else record, {}


def find_files(pattern: str) -> list[str]:
    """The sorted files that a pattern matches, `**` at any depth; without wildcards the name itself."""
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [pattern]
    if files := sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()):  # noqa: PTH207  as in a shell
        return files
    raise ValueError(f"no file matches {pattern!r}")


def parse_picture(record: Any) -> tuple[bytes, Fields]:
    path = str(column(record, "file"))
    try:
        with click.open_file(path, "rb") as file:
            return file.read(), {"file": path}
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; expected a PNG or JPEG file, or a pattern for them") from None


def parse_patient(record: Any) -> tuple[dict[str, float | None], Fields]:
    """A patient from NAME=VALUE words, all values in order, or named columns. Names may be shortened; `-` is not measured."""
    values = record.split() if isinstance(record, str) else record if isinstance(record, list | dict) else [record]
    echo, patient = Fields(), dict[str, float | None]()
    if isinstance(values, dict):
        echo = {name: value for name, value in values.items() if name == "id"}
        pairs = [item for item in values.items() if item[0] not in echo]
    elif any("=" in str(value) for value in values):
        pairs = [(name, value) for name, _, value in (str(word).partition("=") for word in values)]
    elif len(values) == len(MEASUREMENTS):
        pairs = [*zip(MEASUREMENTS, values, strict=True)]
    else:
        order = f"{len(MEASUREMENTS)} values in the order {' '.join(MEASUREMENTS)}"
        raise ValueError(f"expected NAME=VALUE or {order}, got {len(values)} values")
    for name, value in pairs:
        matches = [full for full in MEASUREMENTS if full.startswith(name.strip())]
        if len(matches) != 1:
            raise ValueError(f"unknown measurement {name!r}; expected one of {', '.join(MEASUREMENTS)}, or the beginning of one")
        if matches[0] in patient:
            raise ValueError(f"{matches[0]} is given twice")
        try:
            patient[matches[0]] = None if value in ("-", "", None) else float(str(value))
        except ValueError:
            raise ValueError(f"{name}: expected a number, got {value!r}") from None
    return patient, echo


def parse_number(record: Any) -> tuple[int, Fields]:
    text = column(record, "number")
    try:
        return int(str(text)), {"number": int(str(text))}
    except ValueError:
        raise ValueError(f"expected a 64-bit integer, got {text!r}") from None


def column(record: Any, name: str) -> Any:
    """The named column of a record, or the record itself when it has no columns."""
    if isinstance(record, Mapping) and name not in record:
        raise ValueError(f"expected a column {name!r}, got {', '.join(map(repr, record))}")
    return record[name] if isinstance(record, Mapping) else record


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
        predict=lambda client, rows: (digit._asdict() for digit in client.classify(rows)),
        text=lambda fields: f"{fields['file']}: {fields['digit']} ({max(fields['probabilities']):.1%})",
        parse=parse_picture,
        split=lambda arguments: chain.from_iterable(map(find_files, arguments)),
        batch=32,  # large pictures should not fill the memory
    ),
    "diabetes": Adapter(
        field="patients",
        predict=lambda client, rows: (assessment._asdict() for assessment in client.assess(rows)),
        text=lambda fields: join(fields.get("id"), "{probability:.1%} probability of a positive test ({label})".format_map(fields)),
        parse=parse_patient,
        split=lambda arguments: [" ".join(arguments)],
        notice="for teaching and benchmarking only, not for medical decisions",
    ),
    "fizzbuzz": Adapter(
        field="numbers",
        predict=lambda client, rows: ({"word": word} for word in client.answer(rows)),
        text=lambda fields: str(fields["word"]),
        parse=parse_number,
    ),
}


class Lines:
    """The lines of a file. `place` names the latest; `last_ready` says that the next one has not arrived yet."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self._name, self._number, self.last_ready = file, str(file.name).strip("<>"), 0, False

    @property
    def place(self) -> str:
        return f"{self._name}, line {self._number}"

    def __iter__(self) -> Iterator[str]:
        rest = b""
        while block := self._file.read1(READ_BYTES):  # returns what has arrived
            *lines, rest = (rest + block).split(b"\n")
            for i, line in enumerate(lines, 1):
                self._number, self.last_ready = self._number + 1, i == len(lines)
                yield f"{line.decode('utf-8-sig')}\n"
        if rest:
            self._number += 1
            yield rest.decode("utf-8-sig")

    def records(self, form: str | None) -> Iterable[Any]:
        """The records in csv, jsonl or lines, by default the format of the file's suffix. Raises ValueError and csv.Error."""
        form = form or FORMATS.get(Path(self._name).suffix.lower(), "lines")
        if form == "csv":
            return from_csv(self)
        texts = filter(None, map(str.strip, self))
        return map(from_json, texts) if form == "jsonl" else texts


def from_csv(lines: Iterable[str]) -> Iterator[Fields]:
    """Rows by the columns of the header."""
    reader = csv.DictReader(lines, strict=True)
    names = reader.fieldnames or []
    if len({*names}) < len(names):
        raise ValueError("two columns have the same name")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"expected {len(names)} columns, as in the header")
        yield row


def read_records(adapter: Adapter, words: Sequence[str], file: BufferedReader | None, form: str | None) -> Iterator[list[Record]]:
    """Batches of the records in the words or in a file; one ends where more have not arrived yet.

    Raises CliError, which names the line, after the records before it.
    """
    lines, batch = Lines(file) if file else None, list[Record]()
    try:
        for record in lines.records(form) if lines else adapter.split(words):
            row, echo = adapter.parse(record)
            batch.append(Record(join(lines.place if lines else "", echo.get("file")), row, echo))
            if len(batch) == adapter.batch or (lines and lines.last_ready):
                yield batch
                batch = []
    except (ValueError, csv.Error) as error:
        yield batch
        reason = "expected text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise CliError(join(lines.place if lines else "", reason)) from None
    yield batch


def predict_all(client: Client, adapter: Adapter, batches: Iterable[list[Record]]) -> Iterator[tuple[Record, Fields]]:
    """Predict batches of records, in order. Raises CliError for a wrong record, and grpc.RpcError.

    A record that is rejected may have been one too many for its batch, so it starts a batch of its own after those before it.
    """
    for batch in batches:
        parts = [batch]
        while parts and (part := parts.pop()):
            try:
                predictions = [*adapter.predict(client, [record.row for record in part])]
            except (ValueError, TypeError, grpc.RpcError) as error:
                row, details = locate(error, adapter.field, len(part))
                if row == 0:
                    raise CliError(join(part[0].place, details)) from None
                parts += [part[row:], part[:row]]
            else:
                yield from ((record, record.echo | fields) for record, fields in zip(part, predictions, strict=True))


def locate(error: Any, field: str, rows: int) -> tuple[int, str]:
    """The index of the row that an error is about, and what is wrong with it. Raises the error of a call that is about none."""
    details = str(error.details() if isinstance(error, grpc.RpcError) else error)
    if match := re.match(rf"{re.escape(field)}\[(\d+)\]\S*: ", details):
        return int(match[1]), details[match.end() :]
    if TOO_LARGE in details:
        return rows // 2, details[details.index(TOO_LARGE) :]  # one of the rows: halve them until it is the only one
    raise error if isinstance(error, grpc.RpcError) else CliError(details)


def print_predictions(adapter: Adapter, predictions: Iterable[tuple[Record, Fields]], output: str, *, draw: bool) -> None:
    """Print predictions as text, as JSON objects or as CSV; with `draw` each picture below its line."""
    writer = None
    for i, (record, fields) in enumerate(predictions):
        if output == "csv":
            row = columns(fields)
            if not writer:
                writer = csv.DictWriter(sys.stdout, row, extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            sys.stdout.flush()
            continue
        if output == "text" and adapter.notice and i == 0:
            click.echo(f"tercet: {adapter.notice}", err=True)
        click.echo(json.dumps(fields) if output == "json" else adapter.text(fields))
        if draw:
            from tercet.cli.render import show_digit  # noqa: PLC0415  imports rich

            with require("serve"):
                from tercet.server.images import decode_image  # noqa: PLC0415  needs Pillow
            click.echo(show_digit(decode_image(record.row, record.place), fields["probabilities"]))


def columns(fields: Fields) -> Fields:
    """A prediction as a row of CSV: a list becomes columns `name_0`, `name_1` and so on."""
    row = Fields()
    for name, value in fields.items():
        row |= {f"{name}_{i}": part for i, part in enumerate(flatten(value))} if isinstance(value, list) else {name: value}
    return row


def flatten(value: Any) -> list[Any]:
    """The values of a nested list, in order."""
    return [leaf for part in value for leaf in flatten(part)] if isinstance(value, list) else [value]
