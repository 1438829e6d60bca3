"""What a client's calls send and get, apart from any channel: Python values <-> messages, batches <-> parts of them."""

import io
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status

from tercet.proto import diabetes_pb2_grpc, digits_pb2_grpc, fizzbuzz_pb2_grpc, inference_pb2_grpc
from tercet.proto.diabetes_pb2 import AssessRequest, AssessResponse, Patient
from tercet.proto.digits_pb2 import ClassifyRequest, ClassifyResponse, Image
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, AnswerResponse
from tercet.proto.inference_pb2 import DataType, ModelConfig, ModelInferRequest, ModelInferResponse

if TYPE_CHECKING:
    from typing import TypeAlias

    from PIL.Image import Image as PilImage  # who only calls need not have it

    Picture: TypeAlias = bytes | str | Path | np.ndarray | PilImage

Row = TypeVar("Row")
Answer = TypeVar("Answer")

DTYPES = {"UINT8": "u1", "INT64": "<i8", "FP32": "<f4"}
MEASUREMENTS = tuple(Patient.DESCRIPTOR.fields_by_name)
INT64 = range(-(2**63), 2**63)
PIXELS = (28, 28), np.dtype(np.uint8)
PART_BYTES = 3 * 2**20  # of a part's rows: every gRPC server reads messages of 4 MiB unless it was told otherwise
CALLS = 2  # in flight for one batch or stream: one is answered while the next one travels


class Digit(NamedTuple):
    """A digit that was read, and the probabilities of all ten."""

    digit: int
    probabilities: list[float]


class Assessment(NamedTuple):
    """The probability of a positive diabetes test, and the label that follows from it."""

    probability: float
    label: str


class Word(str):
    """What is said for a number; `model` is the name of the model that says so."""

    __slots__ = ("model",)
    model: str

    def __new__(cls, text: str, model: str = "") -> Self:
        """Text, said by a model."""
        word = super().__new__(cls, text)
        word.model = model
        return word


class Part(NamedTuple):
    """Some rows of a batch or of a stream, in one request; `start` have come before them."""

    start: int
    rows: int
    request: Message


class Face(ABC, Generic[Row, Answer]):
    """One way to ask a model: what a row is, how rows become a request, and a response answers."""

    model: str  # whose limit of rows holds
    field: str  # of the request: the one that has the rows

    @abstractmethod
    def method(self, channel: Any) -> Any:
        """What is called."""

    @abstractmethod
    def encode(self, where: str, row: Row) -> Any:
        """What a request has of a row. `where` names the row in errors: ValueError, TypeError."""

    @abstractmethod
    def request(self, encoded: Sequence[Any]) -> Message:
        """A request of rows."""

    @abstractmethod
    def read(self, response: Any) -> Iterable[Answer]:
        """An answer for each row."""

    def size(self, encoded: Any) -> int:
        """Bytes of what a request has of a row."""
        return int(encoded.ByteSize())

    def split(self, rows: Iterable[Row], most: int) -> list[Part]:
        """A batch as parts of at most `most` rows; an empty one is an empty part, which the service refuses."""
        return list(split(self, rows, most)) or [Part(0, 0, self.request([]))]


class Digits(Face["Picture", Digit]):
    """tercet.v1.Digits; a row is a picture."""

    model, field = "mnist", "images"

    def method(self, channel: Any) -> Any:
        """Classify."""
        return digits_pb2_grpc.DigitsStub(channel).Classify

    def encode(self, where: str, row: "Picture") -> Image:
        """A file as it is, or pixels as they are; PIL's as a PNG file. Raises OSError for a path that cannot be read."""
        if isinstance(row, bytes):
            return Image(encoded=row)
        if isinstance(row, str | Path):
            return Image(encoded=Path(row).read_bytes())
        if isinstance(row, np.ndarray):
            if (row.shape, row.dtype) != PIXELS:
                raise ValueError(
                    f"{where}: an array is (28, 28) uint8, 0 = paper, 255 = ink, and not {row.shape} {row.dtype}; "
                    "give any other picture as a PNG or JPEG file or as a PIL image"
                )
            return Image(pixels=row.tobytes())
        if not hasattr(row, "getexif"):
            raise TypeError(
                f"{where}: {row!r} is no picture; give a path, the bytes of a PNG or JPEG file, an array or a PIL image"
            )
        file = io.BytesIO()
        try:
            row.save(file, "PNG", exif=row.getexif())  # EXIF says which side is up
        except OSError as error:
            raise ValueError(f"{where}: {error}; convert the image to RGB") from error
        return Image(encoded=file.getvalue())

    def request(self, encoded: Sequence[Image]) -> ClassifyRequest:
        """Images."""
        return ClassifyRequest(images=encoded)

    def read(self, response: ClassifyResponse) -> list[Digit]:
        """Digits."""
        return [Digit(digit.digit, list(digit.probabilities)) for digit in response.digits]


class Patients(Face[Mapping[str, float | None], Assessment]):
    """tercet.v1.Diabetes; a row maps names of MEASUREMENTS to numbers."""

    model, field = "diabetes", "patients"

    def method(self, channel: Any) -> Any:
        """Assess."""
        return diabetes_pb2_grpc.DiabetesStub(channel).Assess

    def encode(self, where: str, row: Mapping[str, float | None]) -> Patient:
        """The measurements that were taken."""
        if not isinstance(row, Mapping):
            raise TypeError(f"{where}: {row!r} is no patient; map names of measurements to numbers")
        patient = Patient()
        for name, value in row.items():
            if name not in MEASUREMENTS:
                raise ValueError(f"{where}: {name!r} is no measurement; there are {', '.join(MEASUREMENTS)}")
            try:
                if value is not None:
                    setattr(patient, name, value)
            except TypeError:
                raise TypeError(f"{where}.{name}: {value!r} is no number; leave out what was not measured") from None
        return patient

    def request(self, encoded: Sequence[Patient]) -> AssessRequest:
        """Patients."""
        return AssessRequest(patients=encoded)

    def read(self, response: AssessResponse) -> list[Assessment]:
        """Assessments."""
        return [Assessment(found.probability, found.label) for found in response.assessments]


class Numbers(Face[int, Word]):
    """tercet.v1.FizzBuzz; a row is a whole number of 64 bits."""

    model, field = "fizzbuzz", "numbers"

    def method(self, channel: Any) -> Any:
        """Answer."""
        return fizzbuzz_pb2_grpc.FizzBuzzStub(channel).Answer

    def encode(self, where: str, row: int) -> int:
        """A Python int."""
        try:
            number = operator.index(row)
        except TypeError:
            raise TypeError(f"{where}: {row!r} is no whole number") from None
        if number not in INT64:
            raise ValueError(f"{where}: {number} has more than 64 bits; use -2**63 to 2**63 - 1")
        return number

    def size(self, encoded: int) -> int:  # noqa: ARG002  whatever it is
        """As many as a number takes at most."""
        return 10

    def request(self, encoded: Sequence[int]) -> AnswerRequest:
        """Numbers."""
        return AnswerRequest(numbers=encoded)

    def read(self, response: AnswerResponse) -> list[Word]:
        """Words."""
        return [Word(*said) for said in zip(response.words, response.models, strict=True)]


class Tensors(Face[Any, np.ndarray]):
    """Any model over the Open Inference Protocol; a row is what numpy takes for an array of numbers."""

    field = "inputs[0]"

    def __init__(self, config: ModelConfig) -> None:
        [self._input] = config.input
        self.model, self._datatype = config.name, DataType.Name(self._input.data_type).removeprefix("TYPE_")
        self._shape = tuple(self._input.dims)

    def method(self, channel: Any) -> Any:
        """ModelInfer."""
        return inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer

    def encode(self, where: str, row: Any) -> np.ndarray:
        """An array of the model's datatype."""
        return self._array(where, row, self._shape)

    def size(self, encoded: np.ndarray) -> int:
        """Of the array."""
        return encoded.nbytes

    def request(self, encoded: Sequence[np.ndarray] | np.ndarray) -> ModelInferRequest:
        """The raw form."""
        array = np.asarray(encoded)  # (batch, *shape)
        request = ModelInferRequest(model_name=self.model, raw_input_contents=[array.tobytes()])
        request.inputs.add(name=self._input.name, datatype=self._datatype, shape=array.shape)
        return request

    def read(self, response: ModelInferResponse) -> np.ndarray:
        """The output, (batch, *shape)."""
        output = response.outputs[0]
        return np.frombuffer(response.raw_output_contents[0], DTYPES[output.datatype]).reshape(tuple(output.shape))

    def split(self, rows: Any, most: int) -> list[Part]:
        """As of any face, but all at once."""
        array = self._array(self.field, rows, (-1, *self._shape))
        step = max(1, min(most, PART_BYTES // (prod(self._shape) * array.itemsize)))
        starts = range(0, max(1, len(array)), step)
        return [Part(start, len(some), self.request(some)) for start in starts for some in [array[start : start + step]]]

    def _array(self, where: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers of any kind as an array of the model's datatype; a whole number stays what it is. -1 in the shape is any size."""
        array = np.asarray(given)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{where}: {array.dtype} are no numbers; {self._datatype} is right")
        if array.ndim != len(shape) or any(right not in (-1, size) for size, right in zip(array.shape, shape, strict=True)):
            raise ValueError(f"{where}: the shape is {list(array.shape)}; {list(shape)} is right, where -1 is any size")
        with np.errstate(all="ignore"):
            made = array.astype(DTYPES[self._datatype])
        if made.dtype.kind in "iu" and (wrong := np.argwhere(made != array)).size:
            place = "".join(f"[{index}]" for index in wrong[0])
            raise ValueError(f"{where}{place}: {array[tuple(wrong[0])]} is no {self._datatype}")
        return made


class Packer:
    """Takes rows one by one and gives parts of `most` rows, or of fewer when more bytes would be too many."""

    def __init__(self, face: Face[Any, Any], most: int) -> None:
        self._face, self._most = face, most
        self._start, self._bytes = 0, 0
        self._encoded: list[Any] = []

    def put(self, row: Any) -> Part | None:
        """Take a row; give the part that it fills, or the one before it when there is no room in that."""
        encoded = self._face.encode(f"{self._face.field}[{self._start + len(self._encoded)}]", row)
        size = self._face.size(encoded)
        part = self.rest() if self._bytes + size > PART_BYTES else None
        self._encoded.append(encoded)
        self._bytes += size
        return self.rest() if len(self._encoded) == self._most else part  # a full part of one row had none before it

    def rest(self) -> Part | None:
        """Give the rows that are no full part, when there are any."""
        if not self._encoded:
            return None
        part = Part(self._start, len(self._encoded), self._face.request(self._encoded))
        self._start, self._bytes, self._encoded = self._start + part.rows, 0, []
        return part


def window(limit: int, ahead: int) -> tuple[int, int]:
    """Rows of a part, and calls in flight, that are `ahead` rows at most together. Raises ValueError."""
    if ahead < 1:
        raise ValueError(f"ahead: {ahead} rows are never answered; use 1 or more")
    calls = min(CALLS, ahead)
    return min(limit, ahead // calls), calls


def split(face: Face[Row, Any], rows: Iterable[Row], most: int) -> Iterator[Part]:
    """Parts of rows that are read when a part is wanted, and no sooner."""
    packer = Packer(face, most)
    for row in rows:
        if part := packer.put(row):
            yield part
    if part := packer.rest():
        yield part


async def split_async(face: Face[Row, Any], rows: AsyncIterable[Row] | Iterable[Row], most: int) -> AsyncIterator[Part]:
    """As `split`, where rows may have to be awaited."""
    packer = Packer(face, most)
    async for row in each(rows):
        if part := packer.put(row):
            yield part
    if part := packer.rest():
        yield part


async def each(items: AsyncIterable[Row] | Iterable[Row]) -> AsyncIterator[Row]:
    """What is in an iterable of either kind."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def located(error: Any, face: Face[Any, Any], part: Part) -> grpc.RpcError:
    """The error of a part's call, as of the whole: rows are counted as the caller does, and a note says which ones it is about."""
    found = moved(error, face.field, part.start) if part.start else error
    found.add_note(f"in a call with {part.rows} rows, from row {part.start} on")
    return found


def moved(error: Any, field: str, start: int) -> grpc.aio.AioRpcError:
    """An error in which `field[i]` has become `field[start + i]`, in the text and in the google.rpc.BadRequest."""

    def move(text: str) -> str:
        return re.sub(rf"^{re.escape(field)}\[(\d+)\]", lambda found: f"{field}[{start + int(found[1])}]", text)

    metadata = grpc.aio.Metadata()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status, request = Status.FromString(value), BadRequest()
            status.message = move(status.message)
            for detail in status.details:
                if detail.Unpack(request):
                    for violation in request.field_violations:
                        violation.field = move(violation.field)
                    detail.Pack(request)
            value = status.SerializeToString()  # noqa: PLW2901
        metadata.add(key, value)
    return grpc.aio.AioRpcError(error.code(), grpc.aio.Metadata(), metadata, move(error.details() or ""))
