"""Broken requests to the typed services."""

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from tercet.proto.diabetes_pb2 import Patient
from tercet.proto.digits_pb2 import Image as ImageMessage

from tests.server.support import MOST, PIXELS, answer, count, diabetes, digits, fields, refused

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("call", "field", "text"),
    [
        (digits(), "images", f"1 to {MOST}"),
        (digits(*[ImageMessage(pixels=PIXELS)] * (MOST + 1)), "images", f"1 to {MOST}"),
        (digits(ImageMessage(pixels=PIXELS[1:])), "images[0].pixels", f"{len(PIXELS)} bytes"),
        (digits(ImageMessage(pixels=PIXELS), ImageMessage()), "images[1]", "set pixels or encoded"),
        (digits(ImageMessage(pixels=PIXELS), ImageMessage(encoded=b"no picture")), "images[1].encoded", "PNG or JPEG"),
        (diabetes(), "patients", f"1 to {MOST}"),
        (diabetes(Patient(), Patient(glucose_mg_per_dl=-1)), "patients[1].glucose_mg_per_dl", "0 to 1000 mg/dL"),
        (diabetes(Patient(age_years=np.inf)), "patients[0].age_years", "0 to 130 years"),
        (answer(), "numbers", f"1 to {MOST}"),
        (answer(*[0] * MOST, 1024), "numbers", f"1 to {MOST}"),
        (count(1, 10, 0), "step", "leave it out for 1"),
    ],
)
def test_wrong_typed_requests(channel: grpc.Channel, call: Callable[[grpc.Channel], Any], field: str, text: str) -> None:
    """The error names the field of the typed message and says what would be right, before the first response."""
    error = refused(lambda: call(channel))
    assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, [field])
    assert text in error.details()
