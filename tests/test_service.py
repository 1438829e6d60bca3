"""The faces of the service, asked over a real channel."""

from pathlib import Path

import numpy as np
import pytest

import models
from service.card import read_card
from service.client import Client
from tests.conftest import Service


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
def test_every_model_answers_batches(service: Service, workspace: Path, name: str, batch: int) -> None:
    """Any model gives the answers of its card, at any batch size, with either engine."""
    card = read_card(workspace / "models" / name)
    rows = np.resize(card.example_rows(), (batch, *card.input.shape))
    expected = np.resize(np.array([example.probabilities for example in card.examples]), (batch, *card.output.shape))
    with Client(service.address) as client:
        np.testing.assert_allclose(client.infer(name, rows), expected, rtol=0, atol=1e-5)
