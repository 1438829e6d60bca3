"""Rows <-> messages, and rows of any number <-> chunks of one request each. Nothing here does I/O."""

import io
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

import grpc
from google.protobuf.message import Message

from tercet.proto import diabetes_pb2, diabetes_pb2_grpc, digits_pb2, digits_pb2_grpc, fizzbuzz_pb2, fizzbuzz_pb2_grpc
from tercet.proto import inference_pb2 as oip
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from PIL.Image import Image

    Picture: TypeAlias = bytes | str | Path | np.ndarray | Image

Row = TypeVar("Row")
Prediction = TypeVar("Prediction")

MEASUREMENTS = tuple(diabetes_pb2.Patient.DESCRIPTOR.fields_by_name)
CHUNK_BYTES = 3 * 2**20  # of the rows in a request: every gRPC server reads messages of 4 MiB by default
CALLS_IN_FLIGHT = 2  # per batch or stream: one is computed while the next one travels


class Digit(NamedTuple):
    """The most probable digit, and the probabilities of all ten."""

    digit: int
    probabilities: list[float]


class Assessment(NamedTuple):
    """The probability of a positive diabetes test, and the more probable label."""

    probability: float
    label: str


class Word(str):
    """The FizzBuzz word for a number; `model` is the name of the model that predicted it."""

    __slots__ = ("model",)
    model: str

    def __new__(cls, text: str, model: str = "") -> Self:
        word = super().__new__(cls, text)
        word.model = model
        return word


class Chunk(NamedTuple):
    """Consecutive rows of a batch or stream in one request; `start` is the index of the first."""

    start: int
    rows: int
    request: Message


class Codec(Generic[Row, Prediction]):
    """One RPC that predicts: rows -> request, response -> one prediction per row."""

    model: str  # whose limit of rows per request applies
    field: str  # of the request: the one that holds the rows
    rpc: tuple[Any, str, Any]  # stub class, method, type of the request

    def method(self, channel: Any) -> Any:
        return getattr(self.rpc[0](channel), self.rpc[1])

    def encode(self, where: str, row: Row) -> Any:
        """The row as an entry of the request. `where` names it in errors. Raises ValueError, TypeError."""
        raise NotImplementedError

    def request(self, entries: Any) -> Message:
        request: Message = self.rpc[2](**{self.field: entries})
        return request

    def decode(self, response: Any) -> Iterable[Prediction]:
        raise NotImplementedError

    def size(self, entry: Any) -> int:
        """Bytes of an entry."""
        return int(entry.ByteSize())

    def chunks(self, rows: Iterable[Row], max_rows: int) -> list[Chunk]:
        """A whole batch; an empty one is an empty chunk, which the service rejects."""
        return list(chunks(self, rows, max_rows)) or [Chunk(0, 0, self.request([]))]


class DigitsCodec(Codec["Picture", Digit]):
    """tercet.v1.Digits; a row is a picture."""

    model, field, rpc = "mnist", "images", (digits_pb2_grpc.DigitsStub, "Classify", digits_pb2.ClassifyRequest)

    def encode(self, where: str, row: "Picture") -> digits_pb2.Image:
        """Files and pixels as they are, a PIL image as a PNG file. Raises OSError for a path that cannot be read."""
        if isinstance(row, bytes):
            return digits_pb2.Image(encoded=row)
        if isinstance(row, str | Path):
            return digits_pb2.Image(encoded=Path(row).read_bytes())
        if hasattr(row, "dtype"):
            array: Any = row
            if array.shape != (28, 28) or array.dtype != "uint8":
                got = f"{array.shape} {array.dtype}; send any other picture as a PNG or JPEG file or as a PIL image"
                raise ValueError(f"{where}: expected (28, 28) uint8 pixels, 0 = paper, 255 = ink, got {got}")
            return digits_pb2.Image(pixels=array.tobytes())
        if not hasattr(row, "getexif"):
            raise TypeError(f"{where}: expected a path, the bytes of a PNG or JPEG file, an array or a PIL image, got {row!r}")
        file = io.BytesIO()
        try:
            row.save(file, "PNG", exif=row.getexif())  # EXIF says which side is up
        except OSError as error:
            raise ValueError(f"{where}: {error}; convert the image to RGB") from error
        return digits_pb2.Image(encoded=file.getvalue())

    def decode(self, response: digits_pb2.ClassifyResponse) -> list[Digit]:
        return [Digit(digit.digit, list(digit.probabilities)) for digit in response.digits]


class DiabetesCodec(Codec[Mapping[str, float | None], Assessment]):
    """tercet.v1.Diabetes; a row maps names of MEASUREMENTS to numbers, without those that were not measured."""

    model, field, rpc = "diabetes", "patients", (diabetes_pb2_grpc.DiabetesStub, "Assess", diabetes_pb2.AssessRequest)

    def encode(self, where: str, row: Mapping[str, float | None]) -> diabetes_pb2.Patient:
        if not isinstance(row, Mapping):
            raise TypeError(f"{where}: expected a mapping of measurement names to numbers, got {row!r}")
        patient = diabetes_pb2.Patient()
        for name, value in row.items():
            if name not in MEASUREMENTS:
                raise ValueError(f"{where}: unknown measurement {name!r}; expected {', '.join(MEASUREMENTS)}")
            try:
                if value is not None:
                    setattr(patient, name, value)
            except TypeError:
                raise TypeError(f"{where}.{name}: expected a number, got {value!r}; leave out what was not measured") from None
        return patient

    def decode(self, response: diabetes_pb2.AssessResponse) -> list[Assessment]:
        return [Assessment(assessment.probability, assessment.label) for assessment in response.assessments]


class FizzBuzzCodec(Codec[int, Word]):
    """tercet.v1.FizzBuzz; a row is a 64-bit integer."""

    model, field, rpc = "fizzbuzz", "numbers", (fizzbuzz_pb2_grpc.FizzBuzzStub, "Answer", fizzbuzz_pb2.AnswerRequest)

    def encode(self, where: str, row: int) -> int:
        try:
            number = operator.index(row)
        except TypeError:
            raise TypeError(f"{where}: expected an integer, got {row!r}") from None
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{where}: expected a 64-bit integer, -2**63 to 2**63 - 1, got {number}")
        return number

    def size(self, entry: int) -> int:  # noqa: ARG002
        return 10  # the longest varint

    def decode(self, response: fizzbuzz_pb2.AnswerResponse) -> list[Word]:
        return [Word(text, model) for text, model in zip(response.words, response.models, strict=True)]


class TensorCodec(Codec[Any, "np.ndarray"]):
    """Any model over the Open Inference Protocol; a row is an array or whatever numpy makes one of."""

    field, rpc = "inputs[0]", (GRPCInferenceServiceStub, "ModelInfer", oip.ModelInferRequest)

    def __init__(self, config: oip.ModelConfig) -> None:
        [self._input] = config.input
        self.model, self._datatype = config.name, oip.DataType.Name(self._input.data_type).removeprefix("TYPE_")

    def encode(self, where: str, row: Any) -> "np.ndarray":
        return self._array(where, row, [*self._input.dims])

    def size(self, entry: "np.ndarray") -> int:
        return entry.nbytes

    def request(self, entries: Any) -> Message:
        import numpy as np  # noqa: PLC0415  the typed codecs work without it, and start sooner

        array = np.asarray(entries)  # (batch, *shape)
        tensor = {"name": self._input.name, "datatype": self._datatype, "shape": array.shape}
        return oip.ModelInferRequest(model_name=self.model, inputs=[tensor], raw_input_contents=[array.tobytes()])

    def decode(self, response: oip.ModelInferResponse) -> "np.ndarray":
        """The output tensor, (batch, *shape)."""
        import numpy as np  # noqa: PLC0415

        [output], [content] = response.outputs, response.raw_output_contents
        return np.frombuffer(content, _dtype(output.datatype)).reshape(tuple(output.shape))

    def chunks(self, rows: Any, max_rows: int) -> list[Chunk]:
        array = self._array(self.field, rows, [-1, *self._input.dims])
        step = max(1, min(max_rows, CHUNK_BYTES // (prod(self._input.dims) * array.itemsize)))
        parts = ((start, array[start : start + step]) for start in range(0, max(1, len(array)), step))
        return [Chunk(start, len(part), self.request(part)) for start, part in parts]

    def _array(self, where: str, values: Any, shape: list[int]) -> "np.ndarray":
        """Values as an array of the model's datatype, without loss; -1 in the shape stands for any size."""
        import numpy as np  # noqa: PLC0415

        expected = f"{where}: expected {self._datatype} of shape {shape}"
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise ValueError(f"{expected}: {error}") from None
        right = array.ndim == len(shape) and all(size in (-1, got) for size, got in zip(shape, array.shape, strict=True))
        if array.dtype.kind not in "biuf" or not right:
            raise ValueError(f"{expected}, got {array.dtype} of shape {[*array.shape]}")
        with np.errstate(all="ignore"):
            converted = array.astype(_dtype(self._datatype))
        if converted.dtype.kind in "iu" and (wrong := np.argwhere(converted != array)).size:
            place = "".join(f"[{index}]" for index in wrong[0])
            raise ValueError(f"{where}{place}: expected {self._datatype}, got {array[tuple(wrong[0])]}")
        return converted


def _dtype(datatype: str) -> "np.dtype[Any]":
    from tercet.card import DATATYPES  # noqa: PLC0415  imports numpy

    return DATATYPES[datatype].dtype


class Chunker:
    """Collects rows one by one into chunks of at most `max_rows` rows and CHUNK_BYTES bytes; a larger row is sent alone."""

    def __init__(self, codec: Codec[Any, Any], max_rows: int) -> None:
        self._codec, self._max_rows, self._start = codec, max_rows, 0
        self._entries: list[Any] = []
        self._bytes = 0

    def add(self, row: Any) -> Chunk | None:
        """Add a row; return the chunk that it completes, or the one that has no room for it."""
        entry = self._codec.encode(f"{self._codec.field}[{self._start + len(self._entries)}]", row)
        size = self._codec.size(entry)
        chunk = self.flush() if self._bytes + size > CHUNK_BYTES else None
        self._entries.append(entry)
        self._bytes += size
        return self.flush() if len(self._entries) == self._max_rows else chunk  # never both: max_rows = 1 leaves nothing to flush

    def flush(self) -> Chunk | None:
        """The rows that are left, if there are any."""
        if not (entries := self._entries):
            return None
        chunk = Chunk(self._start, len(entries), self._codec.request(entries))
        self._start, self._bytes, self._entries = self._start + len(entries), 0, []
        return chunk


def chunks(codec: Codec[Row, Any], rows: Iterable[Row], max_rows: int) -> Iterator[Chunk]:
    """Chunks of rows, which are read only when a chunk is needed."""
    chunker = Chunker(codec, max_rows)
    yield from filter(None, map(chunker.add, rows))
    if last := chunker.flush():
        yield last


def stream_limits(max_rows: int, ahead: int) -> tuple[int, int]:
    """Rows per chunk and calls in flight that together read at most `ahead` rows ahead. Raises ValueError."""
    if ahead < 1:
        raise ValueError(f"ahead: expected 1 or more rows, got {ahead}")
    calls = min(CALLS_IN_FLIGHT, ahead)
    return min(max_rows, ahead // calls), calls


def with_batch_indices(error: Any, field: str, chunk: Chunk) -> grpc.RpcError:
    """Rewrite the row indices in a chunk's error to refer to the caller's batch, in the text and in google.rpc.BadRequest."""
    from google.rpc.error_details_pb2 import BadRequest  # noqa: PLC0415  only needed here
    from google.rpc.status_pb2 import Status  # noqa: PLC0415

    def shift(text: str) -> str:
        return re.sub(rf"^({re.escape(field)}\[)(\d+)", lambda match: f"{match[1]}{chunk.start + int(match[2])}", text)

    if chunk.start:
        key, request = "grpc-status-details-bin", BadRequest()
        status = Status.FromString(dict(error.trailing_metadata() or ()).get(key, b""))
        status.code, status.message = error.code().value[0], shift(error.details() or "")
        for detail in filter(lambda detail: detail.Unpack(request), status.details):
            for violation in request.field_violations:
                violation.field = shift(violation.field)
            detail.Pack(request)
        trailers = grpc.aio.Metadata((key, status.SerializeToString()))
        error = grpc.aio.AioRpcError(error.code(), grpc.aio.Metadata(), trailers, status.message)
    error.add_note(f"in a call with {chunk.rows} rows, from row {chunk.start} on")
    return error  # type: ignore[no-any-return]
