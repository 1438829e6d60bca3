"""tercet.v1.Digits."""

import numpy as np
import pytest
from PIL import Image
from tercet.card import Card
from tercet.client import Client

from tests.conftest import Service
from tests.server.support import answers, encoded, labels

pytestmark = pytest.mark.slow


def test_digits(service: Service, cards: dict[str, Card]) -> None:
    """Digits are classified equally from pixels, PNG and JPEG, even when they are large and black on white."""
    card = cards["mnist"]
    pictures = [Image.fromarray(row) for row in card.example_rows()]
    large = [Image.fromarray(255 - row).resize((280, 280), Image.Resampling.BICUBIC) for row in card.example_rows()]
    with Client(service.address) as client:
        for images in (list(card.example_rows()), [encoded(picture, "PNG") for picture in pictures]):
            found = client.classify(images)
            np.testing.assert_allclose([digit.probabilities for digit in found], answers(card), rtol=0, atol=1e-5)
            assert [str(digit.digit) for digit in found] == labels(card)
        for kind, some in (("JPEG", pictures), ("PNG", large), ("JPEG", large)):
            found = client.classify([encoded(picture, kind) for picture in some])
            assert [str(digit.digit) for digit in found] == [example.target for example in card.examples]
