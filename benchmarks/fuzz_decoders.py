"""Fuzz the decoders, guided by coverage, with atheris (`pip install atheris`).

    python -m benchmarks.fuzz_decoders tensors -runs=1000000

The first argument is `tensors`, `images` or `patients`, the others are libFuzzer's. A decoder returns rows or raises
InvalidInputError; any other error is a crash, and its input is kept as crash-* in the current folder.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tercet", "PIL"]):
    from google.protobuf.message import DecodeError
    from PIL import PngImagePlugin
    from tercet.card import find_models, read_card
    from tercet.errors import InvalidInputError
    from tercet.proto.diabetes_pb2 import Patient
    from tercet.proto.inference_pb2 import ModelInferRequest
    from tercet.server.images import decode_image
    from tercet.server.servicers.diabetes import decode_patient
    from tercet.server.tensors import INPUT_FIELD, decode_request, encode_response

MODELS = Path("models")
# skip the checksums, to get beyond them
PngImagePlugin.ChunkStream.crc = PngImagePlugin.ChunkStream.crc_skip  # type: ignore[method-assign]
CARDS = [read_card(MODELS / name) for name in find_models(MODELS)]


def tensors(content: bytes) -> None:
    """Decode a request; the first byte chooses the model."""
    card = CARDS[content[0] % len(CARDS)] if content else CARDS[0]
    with contextlib.suppress(DecodeError, InvalidInputError):
        request = ModelInferRequest.FromString(content[1:])
        rows = decode_request(request, card)
        card.input.check(rows, INPUT_FIELD)
        encode_response(rows, request, card)


def images(content: bytes) -> None:
    with contextlib.suppress(InvalidInputError):
        decode_image(content, "image")


def patients(content: bytes) -> None:
    card = next(card for card in CARDS if card.name == "diabetes")
    with contextlib.suppress(DecodeError, InvalidInputError):
        decode_patient(Patient.FromString(content), card)


TARGETS: dict[str, Callable[[bytes], None]] = {"tensors": tensors, "images": images, "patients": patients}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
