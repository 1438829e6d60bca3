"""What `tercet predict` does: read what is asked, ask in chunks, write the answers as they come.

    arguments, lines, JSON lines, CSV --records--> items --chunks--> service --answers--> text, JSON lines, CSV

A record is what one argument, line or row says; an item is what the service is asked for it. Nothing is read before it is needed,
so a file may be of any length. A record that is wrong ends it, with its place; what comes before is answered.
"""

import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc
import numpy as np

from tercet.cli.render import show_digit
from tercet.client import MEASUREMENTS, Client

CHUNK = 256  # items of a request
CHUNK_BYTES = 2**18  # or so many bytes of pictures: a few large ones, as they also cost pixels
BLOCK = 2**16  # bytes of a file that are read at once
SUFFIXES = {".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl"}  # all others are lines
FIELD = re.compile(r"^\S+: ")  # what the service calls the part that is wrong; it is of the one item of a request
TOO_LARGE = "Received message larger than max"  # as gRPC says it, as RESOURCE_EXHAUSTED
INT64 = range(-(2**63), 2**63)

Answer = dict[str, Any]


class WrongInputError(Exception):
    """What is asked cannot be; the message says where and why."""


class Item(NamedTuple):
    """What the service is asked for one record."""

    place: str  # for an error
    known: Answer  # what the answer repeats of the record
    value: Any  # as the client takes it
    urgent: bool = False  # the next has not come yet: answer this one before waiting


class Face:
    """How any model is asked: rows as JSON, over the Open Inference Protocol."""

    def __init__(self, model: str) -> None:
        self.model = model

    def records(self, values: Sequence[str]) -> Iterable[Any]:
        """What the arguments say. Raises ValueError."""
        rows = from_json(" ".join(values))
        if not isinstance(rows, list):
            raise ValueError(f"{rows!r} is no batch of rows; write JSON such as '[[0.5, 1.0]]'")  # noqa: TRY004  see Raises
        return rows

    def read(self, record: Any, place: str) -> Item:
        """What is asked for a record: a line's words, a row of CSV by its columns, or a JSON value. Raises ValueError."""
        if isinstance(record, Mapping):
            raise ValueError(f"columns mean nothing to {self.model!r}; write each row as a line of JSON such as [0.5, 1.0]")  # noqa: TRY004
        return Item(place, {}, from_json(record) if isinstance(record, str) else record)

    def ask(self, client: Client, values: Sequence[Any]) -> Iterable[Answer]:
        """The answers, in order. Raises grpc.RpcError, and ValueError when the values are not of one kind."""
        return [{"output": row.tolist()} for row in client.infer(self.model, values)]

    def text(self, answer: Answer) -> str:
        """An answer for a person."""
        return " ".join(f"{value:.4g}" for value in np.ravel(answer["output"]))


class Digits(Face):
    """Pictures: files, or columns `file`."""

    def records(self, values: Sequence[str]) -> Iterable[Any]:
        """Files; patterns stand for the files that they match."""
        return (path for value in values for path in files(value))

    def read(self, record: Any, place: str) -> Item:
        """The content of a file; `-` is stdin."""
        path = str(column(record, "file"))
        try:
            with click.open_file(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read: {error.strerror}; name PNG or JPEG files, or a pattern such as 'digits/*.png'"
            ) from None
        return Item(": ".join(filter(None, (place, path))), {"file": path}, content)

    def ask(self, client: Client, values: Sequence[Any]) -> Iterable[Answer]:
        """Digits and their probabilities."""
        return [digit._asdict() for digit in client.classify(values)]

    def text(self, answer: Answer) -> str:
        """File, digit and how sure."""
        return f"{answer['file']}: {answer['digit']} ({max(answer['probabilities']):.1%})"


class Patients(Face):
    """Measurements: NAME=VALUE, or all in order, `-` for not measured; or columns, and `id`, which is repeated in the answer."""

    def records(self, values: Sequence[str]) -> Iterable[Any]:
        """One patient."""
        return [values]

    def read(self, record: Any, place: str) -> Item:
        """Measurements by name."""
        known = {"id": record["id"]} if isinstance(record, Mapping) and "id" in record else {}
        patient: dict[str, float | None] = {}
        for name, value in pairs(record):
            if name in known:
                continue
            full = measurement(name.strip())
            if full in patient:
                raise ValueError(f"{full} is given twice")
            patient[full] = None if value in ("-", "", None) else number(value, float, f"{name}=")
        return Item(place, known, {name: value for name, value in patient.items() if value is not None})

    def ask(self, client: Client, values: Sequence[Any]) -> Iterable[Answer]:
        """Probabilities and labels."""
        return [assessment._asdict() for assessment in client.assess(values)]

    def text(self, answer: Answer) -> str:
        """Label and probability, and what it is not."""
        name = f"{answer['id']}: " if "id" in answer else ""
        return f"{name}{answer['label']}: {answer['probability']:.1%} probability of a positive test; no diagnosis"


class Numbers(Face):
    """Whole numbers, or columns `number`."""

    def records(self, values: Sequence[str]) -> Iterable[Any]:
        """One number each."""
        return values

    def read(self, record: Any, place: str) -> Item:
        """A number of 64 bits."""
        value = number(column(record, "number"), int64)
        return Item(place, {"number": value}, value)

    def ask(self, client: Client, values: Sequence[Any]) -> Iterable[Answer]:
        """Words."""
        return [{"word": word} for word in client.answer(values)]

    def text(self, answer: Answer) -> str:
        """The word."""
        return str(answer["word"])


FACES: dict[str, type[Face]] = {"mnist": Digits, "diabetes": Patients, "fizzbuzz": Numbers}


def files(pattern: str) -> list[str]:
    """The files that a pattern matches, `**` in any depth, sorted; or the name itself. Raises ValueError when it matches none."""
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [pattern]
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())  # noqa: PTH207  as the shell does
    if not found:
        raise ValueError(f"{pattern!r} matches no file")
    return found


def column(record: Any, name: str) -> Any:
    """A record's only value, or that of a column. Raises ValueError when there is none of that name."""
    if not isinstance(record, Mapping):
        return record
    if name not in record:
        raise ValueError(f"there is no column {name!r}; there are {', '.join(map(repr, record))}")
    return record[name]


def pairs(record: Any) -> Iterable[tuple[str, Any]]:
    """Names and values of a patient. Raises ValueError when it is neither NAME=VALUE nor all values in order."""
    if isinstance(record, Mapping):
        return record.items()
    values = record.split() if isinstance(record, str) else record if isinstance(record, list | tuple) else [record]
    if any("=" in str(value) for value in values):
        return [(name, value) for name, _, value in (str(value).partition("=") for value in values)]
    if len(values) != len(MEASUREMENTS):
        raise ValueError(f"{len(values)} values; give {len(MEASUREMENTS)} in the order {' '.join(MEASUREMENTS)}, or NAME=VALUE")
    return zip(MEASUREMENTS, values, strict=True)


def measurement(name: str) -> str:
    """The measurement that a name, perhaps shortened, stands for. Raises ValueError."""
    matches = [known for known in MEASUREMENTS if known.startswith(name)]
    if len(matches) != 1:
        raise ValueError(f"{name!r} names no measurement; there are {', '.join(MEASUREMENTS)}, which may be shortened")
    return matches[0]


def number(value: Any, kind: Callable[[str], Any], name: str = "") -> Any:
    """A value, written or from JSON, as a float or an int64. Raises ValueError."""
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError(f"{name}{value!r} is no {'number' if kind is float else 'whole number of 64 bits'}") from None


def int64(text: str) -> int:
    """Read a whole number of 64 bits. Raises ValueError when it is none."""
    if (value := int(text)) not in INT64:
        raise ValueError
    return value


def from_json(text: str) -> Any:
    """Read JSON. Raises ValueError."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text[:40]!r} is no JSON: {error}") from None


def arguments(face: Face, values: Sequence[str]) -> Iterator[Item]:
    """What the arguments ask. Raises WrongInputError."""
    try:
        for record in face.records(values):
            yield face.read(record, "")
    except ValueError as error:
        raise WrongInputError(str(error)) from None


def lines(face: Face, stream: BufferedReader, kind: str | None) -> Iterator[Item]:
    """What a file asks, of a kind of READERS, else told by its suffix. Raises WrongInputError with the line."""
    name = stream.name.strip("<>")
    text = Lines(stream)
    try:
        for record in READERS[kind or SUFFIXES.get(Path(name).suffix.lower(), "lines")](text):
            yield face.read(record, f"{name}, line {text.number}")._replace(urgent=not text.more)
    except UnicodeDecodeError:
        raise WrongInputError(f"{name}, line {text.number}: no text in UTF-8; save it as such") from None
    except (ValueError, csv.Error) as error:
        raise WrongInputError(f"{name}, line {text.number}: {error}") from None


class Lines:
    """The lines of a file; `number` is that of the latest, from 1 on, `more` whether the next is there without waiting."""

    def __init__(self, stream: BufferedReader) -> None:
        self._stream, self.number, self.more = stream, 0, False

    def __iter__(self) -> Iterator[str]:
        """Raise UnicodeDecodeError for what is no UTF-8."""
        rest = b""
        while block := self._stream.read1(BLOCK):  # what is there
            *found, rest = (rest + block).split(b"\n")
            for i, line in enumerate(found, 1):
                self.number, self.more = self.number + 1, i < len(found)
                yield f"{line.decode('utf-8-sig')}\n"
        if rest:
            self.number += 1
            yield rest.decode("utf-8-sig")


def from_lines(text: Iterable[str]) -> Iterator[str]:
    """Each line as one argument, or all of a patient's, would say it."""
    return filter(None, map(str.strip, text))


def from_json_lines(text: Iterable[str]) -> Iterator[Any]:
    """A JSON value a line. Raises ValueError."""
    return map(from_json, from_lines(text))


def from_csv(text: Iterable[str]) -> Iterator[dict[str, str]]:
    """Rows by the columns of the header. Raises ValueError and csv.Error."""
    reader = csv.DictReader(text, strict=True)
    names = reader.fieldnames or []
    if len({*names}) < len(names):
        raise ValueError("two columns have one name")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"the header has {len(names)} columns, and this row more or fewer")
        yield row


READERS: dict[str, Callable[[Iterable[str]], Iterator[Any]]] = {"csv": from_csv, "jsonl": from_json_lines, "lines": from_lines}


def answers(client: Client, face: Face, items: Iterator[Item]) -> Iterator[tuple[Item, Answer]]:
    """Ask in chunks; each answer repeats what is known. Raises grpc.RpcError, and WrongInputError for what the service refuses."""
    for chunk in chunks(items):
        for item, answer in ask(client, face, chunk):
            yield item, {**item.known, **answer}


def chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Items in lists for one request each. What comes before a wrong one is handed on first."""
    chunk: list[Item] = []
    size = 0
    try:
        for item in items:
            chunk.append(item)
            size += len(item.value) if isinstance(item.value, bytes) else 0
            if item.urgent or len(chunk) == CHUNK or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    except WrongInputError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def ask(client: Client, face: Face, items: list[Item]) -> Iterator[tuple[Item, Answer]]:
    """Ask in one request, and in halves when that is refused: so too large a request passes, and a wrong item is found."""
    try:
        found = face.ask(client, [item.value for item in items])
    except (ValueError, TypeError, OverflowError) as error:
        reason = f"{face.model!r} takes no such row: {error}"
    except grpc.RpcError as error:
        details = error.details() or ""
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT and TOO_LARGE not in details:
            raise
        reason = FIELD.sub("", details)
    else:
        yield from zip(items, found, strict=True)
        return
    if len(items) == 1:
        raise WrongInputError(": ".join(filter(None, (items[0].place, reason))))
    middle = len(items) // 2
    yield from ask(client, face, items[:middle])
    yield from ask(client, face, items[middle:])


def as_text(face: Face, answered: Iterable[tuple[Item, Answer]]) -> Iterator[str]:
    """For a person."""
    return (face.text(answer) for _, answer in answered)


def as_drawing(face: Face, answered: Iterable[tuple[Item, Answer]]) -> Iterator[str]:
    """Pictures as the model sees them, beside bars. Raises ImportError when Pillow is not installed."""
    from tercet.server.images import decode_image  # noqa: PLC0415  only here does a client need Pillow

    for item, answer in answered:
        yield face.text(answer)
        yield show_digit(decode_image(item.value, item.place), answer["probabilities"])


def as_json(_face: Face, answered: Iterable[tuple[Item, Answer]]) -> Iterator[str]:
    """An object a line."""
    return (json.dumps(answer) for _, answer in answered)


def as_csv(_face: Face, answered: Iterable[tuple[Item, Answer]]) -> Iterator[str]:
    """A header and rows; a list becomes columns `name_0`, `name_1` and so on."""
    header: list[str] = []
    for _, answer in answered:
        row = flatten(answer)
        if not header:
            header = list(row)
            yield csv_line(header)
        yield csv_line(row.get(name, "") for name in header)


def flatten(answer: Answer) -> Answer:
    """An answer without lists."""
    flat: Answer = {}
    for name, value in answer.items():
        parts = np.ravel(value).tolist() if isinstance(value, list) else None
        flat |= {name: value} if parts is None else {f"{name}_{i}": part for i, part in enumerate(parts)}
    return flat


def csv_line(values: Iterable[Any]) -> str:
    """Values as one line of CSV, without its end."""
    line = StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


Writer = Callable[[Face, Iterable[tuple[Item, Answer]]], Iterator[str]]
WRITERS: dict[str, Writer] = {"text": as_text, "json": as_json, "csv": as_csv}
