"""Fuzz the decoders by coverage, with atheris (`pip install atheris`): `python benchmarks/fuzz_decoders.py tensors -runs=1000000`.

The first argument is `tensors`, `images` or `patients`, the others are libFuzzer's. A decoder gives rows or raises
InvalidInputError; other errors are crashes, and what led to one is kept as crash-* in the folder of the call.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service", "PIL"]):
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
# to get beyond the checksums
PngImagePlugin.ChunkStream.crc = PngImagePlugin.ChunkStream.crc_skip  # type: ignore[method-assign]
CARDS = [read_card(MODELS / name) for name in find_models(MODELS)]


def tensors(content: bytes) -> None:
    """The first byte chooses a model, the others are a request."""
    card = CARDS[content[0] % len(CARDS)] if content else CARDS[0]
    with contextlib.suppress(DecodeError, InvalidInputError):
        request = ModelInferRequest.FromString(content[1:])
        rows = decode_request(request, card)
        card.input.check(rows, INPUT_FIELD)
        encode_response(rows, request, card)


def images(content: bytes) -> None:
    """A file."""
    with contextlib.suppress(InvalidInputError):
        decode_image(content, "image")


def patients(content: bytes) -> None:
    """One patient."""
    card = next(card for card in CARDS if card.name == "diabetes")
    with contextlib.suppress(DecodeError, InvalidInputError):
        decode_patient(Patient.FromString(content), card)


TARGETS: dict[str, Callable[[bytes], None]] = {"tensors": tensors, "images": images, "patients": patients}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
