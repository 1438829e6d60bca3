"""trefoil.v1.Digits: pictures of handwritten digits."""

import asyncio
from typing import Any

import numpy as np

from proto import digits_pb2_grpc
from proto.digits_pb2 import ClassifyRequest, ClassifyResponse, Digit, Image
from service.card import Rows
from service.errors import InvalidInputError, answers
from service.images import SIDE, decode_image
from service.servicers import Face


class DigitsServicer(Face, digits_pb2_grpc.DigitsServicer):
    """Answers with the model `mnist`."""

    @answers
    async def Classify(self, request: ClassifyRequest, _context: Any) -> ClassifyResponse:  # noqa: N802
        """Read each picture's digit."""
        model = self._repository.get("mnist")
        images = await asyncio.to_thread(decode, request)  # a large picture takes long
        return encode(await model.infer(images, "images[{row}]"))


def decode(request: ClassifyRequest) -> Rows:
    """All pictures, (batch, 28, 28) uint8. Raises InvalidInputError."""
    return np.array([decode_one(image, f"images[{i}]") for i, image in enumerate(request.images)], dtype=np.uint8)


def decode_one(image: Image, where: str) -> Rows:
    """One picture as (28, 28) uint8. Raises InvalidInputError."""
    match image.WhichOneof("content"):
        case "pixels":
            pixels = image.pixels
            if len(pixels) != SIDE * SIDE:
                raise InvalidInputError(f"{where}.pixels", f"{SIDE} x {SIDE} pixels are {SIDE * SIDE} bytes, got {len(pixels)}")
            return np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE)
        case "encoded":
            return decode_image(image.encoded, f"{where}.encoded")
        case _:
            raise InvalidInputError(where, "is empty: set pixels or encoded")


def encode(probabilities: Rows) -> ClassifyResponse:
    """(batch, 10) -> the response."""
    best = probabilities.argmax(axis=1).tolist()
    return ClassifyResponse(digits=[Digit(digit=d, probabilities=p) for d, p in zip(best, probabilities.tolist(), strict=True)])
