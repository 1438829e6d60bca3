"""Helpers for several test modules of the server."""

import asyncio
import io
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from PIL import Image, ImageDraw
from tercet.card import Card, Rows
from tercet.client import Client
from tercet.proto.diabetes_pb2 import AssessRequest, Patient
from tercet.proto.diabetes_pb2_grpc import DiabetesStub
from tercet.proto.digits_pb2 import ClassifyRequest
from tercet.proto.digits_pb2 import Image as ImageMessage
from tercet.proto.digits_pb2_grpc import DigitsStub
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.server.app import Server
from tercet.server.batcher import Batcher
from tercet.server.config import Config

from tests.conftest import BIN, Service, run

MOST = Config().max_request_rows


SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


PIXELS = bytes(28 * 28)


def refused(call: Callable[[], Any]) -> Any:
    """Return the error of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def unpack(error: Any, kind: Any) -> list[Any]:
    """The google.rpc details of one kind in an error."""
    found, status = kind(), rpc_status.from_call(error)
    return [found for detail in status.details if detail.Unpack(found)] if status else []


def fields(error: Any) -> list[str]:
    """The fields that an error names."""
    return [violation.field for details in unpack(error, BadRequest) for violation in details.field_violations]


def infer_request(card: Card, rows: Rows) -> ModelInferRequest:
    """A valid request with raw contents."""
    request = ModelInferRequest(model_name=card.name, raw_input_contents=[rows.tobytes()])
    request.inputs.add(name=card.input.name, datatype=card.input.datatype, shape=rows.shape)
    return request


def digits(*images: ImageMessage) -> Callable[[grpc.Channel], Any]:
    """A call of Digits.Classify."""
    return lambda channel: DigitsStub(channel).Classify(ClassifyRequest(images=images))


def diabetes(*patients: Patient) -> Callable[[grpc.Channel], Any]:
    """A call of Diabetes.Assess."""
    return lambda channel: DiabetesStub(channel).Assess(AssessRequest(patients=patients))


def answer(*numbers: int) -> Callable[[grpc.Channel], Any]:
    """A call of FizzBuzz.Answer."""
    return lambda channel: FizzBuzzStub(channel).Answer(AnswerRequest(numbers=numbers))


def count(start: int, stop: int, step: int) -> Callable[[grpc.Channel], Any]:
    """A call of FizzBuzz.Count that reads its first message."""
    return lambda channel: next(FizzBuzzStub(channel).Count(CountRequest(start=start, stop=stop, step=step)))


def reflect(channel: grpc.Channel) -> Any:
    """A call of the reflection service."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    return next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request])))


class HeldEngine:
    """Answers every row with `number`, once the test sets `open`."""

    name, platform, device, max_batch_rows, inline_rows = "held 1", "held", "cpu", 4, 0

    def __init__(self) -> None:
        self.executed: list[int] = []
        self.begun, self.open = threading.Event(), threading.Event()
        self.fails = False

    def run(self, rows: Rows) -> Rows:
        """(n,) -> (n, 4)."""
        self.executed += rows.tolist()
        self.begun.set()
        if self.fails or not self.open.wait(60):
            raise OSError("/secret/path")
        return np.tile(np.array([1, 0, 0, 0], np.float32), (len(rows), 1))


class Visits:
    """Semaphores for the requests that reach a batcher and leave it, in whatever way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came, self.left = asyncio.Semaphore(0), asyncio.Semaphore(0)
        infer = Batcher.infer

        async def watched(batcher: Batcher, rows: Rows) -> Rows:
            self.came.release()
            try:
                return await infer(batcher, rows)
            finally:
                self.left.release()

        monkeypatch.setattr(Batcher, "infer", watched)


@asynccontextmanager
async def inside(folder: Path, **settings: Any) -> AsyncIterator[tuple[Server, Any]]:
    """A server in this process and a channel to it."""
    server = Server(Config(port=0, models=folder, **settings))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.config.address) as channel:
            yield server, channel
    finally:
        await server.stop()


def refusal(*flags: str, **environment: str) -> str:
    """The last line of `tercet serve` when it does not start; there must be no traceback."""
    done = run(str(BIN / "tercet"), "serve", *flags, cwd=Path("/"), check=False, **environment)
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout.splitlines()[-1]


def answers(card: Card) -> Rows:
    """The outputs of a card's examples, (examples, classes)."""
    return np.array([example.output for example in card.examples])


def labels(card: Card) -> list[str]:
    """The predicted labels of a card's examples."""
    return [card.labels[i] for i in answers(card).argmax(axis=1)]


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def four(width: int = 120, height: int = 180, *, mode: str = "L", paper: object = 255, ink: object = 0) -> Image.Image:
    """A 4, drawn off centre, with strokes a tenth of the image wide."""
    picture = Image.new(mode, (width, height), paper)  # type: ignore[arg-type]
    corners = [(0.5, 0.1), (0.1, 0.5), (0.6, 0.5), (0.5, 0.1), (0.5, 0.8)]
    ImageDraw.Draw(picture).line([(x * width, y * height) for x, y in corners], fill=ink, width=width // 10)  # type: ignore[arg-type]
    return picture


def bomb(width: int, height: int, colour: int = 0) -> bytes:
    """A PNG whose header claims a size and that has no pixels: decoding it is a different error."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ask(service: Service, **options: Any) -> Sequence[str]:
    """One call on a connection of its own."""
    with Client(service.address, timeout=20, **options) as client:
        return client.answer([15])
