"""tercet.v1.Digits: pictures of handwritten digits."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tercet.card import Rows
from tercet.errors import InvalidInputError, answers
from tercet.proto import digits_pb2_grpc
from tercet.proto.digits_pb2 import ClassifyRequest, ClassifyResponse, Digit, Image
from tercet.server.images import SIDE, Allowance, decode_image
from tercet.server.repository import Repository
from tercet.server.servicers import Face

DECODERS = 4  # pictures that are decoded at a time; a large one takes up to 0.3 GB


class DigitsServicer(Face, digits_pb2_grpc.DigitsServicer):
    """Answers with the model `mnist`."""

    def __init__(self, repository: Repository) -> None:
        super().__init__(repository)
        self._decoders = ThreadPoolExecutor(DECODERS)

    @answers
    async def Classify(self, request: ClassifyRequest, _context: Any) -> ClassifyResponse:  # noqa: N802
        """Read each picture's digit."""
        model = self._repository.get("mnist")
        model.admit(request.images, "images")
        images = await asyncio.get_running_loop().run_in_executor(self._decoders, decode, request)  # a large picture takes long
        return encode(await model.infer(images, "images[{row}]"))


def decode(request: ClassifyRequest) -> Rows:
    """All pictures, (batch, 28, 28) uint8. Raises InvalidInputError."""
    allowance = Allowance()
    return np.array([decode_one(image, f"images[{i}]", allowance) for i, image in enumerate(request.images)], dtype=np.uint8)


def decode_one(image: Image, where: str, allowance: Allowance) -> Rows:
    """One picture as (28, 28) uint8. Raises InvalidInputError."""
    match image.WhichOneof("content"):
        case "pixels":
            pixels = image.pixels
            if len(pixels) != SIDE * SIDE:
                raise InvalidInputError(f"{where}.pixels", f"{SIDE} x {SIDE} pixels are {SIDE * SIDE} bytes, got {len(pixels)}")
            return np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE)
        case "encoded":
            return decode_image(image.encoded, f"{where}.encoded", allowance)
        case _:
            raise InvalidInputError(where, "is empty: set pixels or encoded")


def encode(probabilities: Rows) -> ClassifyResponse:
    """(batch, 10) -> the response."""
    best = probabilities.argmax(axis=1).tolist()
    return ClassifyResponse(digits=[Digit(digit=d, probabilities=p) for d, p in zip(best, probabilities.tolist(), strict=True)])
