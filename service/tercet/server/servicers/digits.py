"""tercet.v1.Digits: images of handwritten digits."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tercet.card import Rows
from tercet.errors import InvalidInputError
from tercet.proto import digits_pb2 as pb
from tercet.proto import digits_pb2_grpc
from tercet.server.images import SIDE, PixelBudget, decode_image
from tercet.server.rpc import BaseServicer

DECODERS = ThreadPoolExecutor(4)  # a large image takes up to 0.3 GB while it is decoded


class DigitsServicer(BaseServicer, digits_pb2_grpc.DigitsServicer):
    """Answers with the model `mnist`."""

    async def Classify(self, request: pb.ClassifyRequest, _context: Any) -> pb.ClassifyResponse:
        model = self.repository.get("mnist")
        model.check_row_count(request.images, "images")
        rows = await asyncio.get_running_loop().run_in_executor(DECODERS, decode_request, request)  # may take seconds
        probabilities = (await model.infer(rows, "images[{row}]")).tolist()
        return pb.ClassifyResponse(digits=[pb.Digit(digit=p.index(max(p)), probabilities=p) for p in probabilities])


def decode_request(request: pb.ClassifyRequest) -> Rows:
    """All images, (batch, 28, 28) uint8. Raises InvalidInputError."""
    budget = PixelBudget()
    return np.array([_decode(image, f"images[{i}]", budget) for i, image in enumerate(request.images)], dtype=np.uint8)


def _decode(image: pb.Image, field: str, budget: PixelBudget) -> Rows:
    if image.HasField("encoded"):
        return decode_image(image.encoded, f"{field}.encoded", budget)
    if not image.HasField("pixels"):
        raise InvalidInputError(field, "is empty: set pixels or encoded")
    if len(pixels := image.pixels) != SIDE * SIDE:
        raise InvalidInputError(f"{field}.pixels", f"expected {SIDE} x {SIDE} = {SIDE * SIDE} bytes, got {len(pixels)}")
    return np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE)
