"""The FizzBuzz network learns the rule from 101 to 1023."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from models.fizzbuzz.dataset import answer
from pipeline.common import load_params
from pipeline.train import Params, fit
from tests.conftest import REPOSITORY

TRAIN = np.arange(101, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_rule_is_learned_without_error(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on 101..1023, the network answers 1..100 without an error, whatever the seed."""
    monkeypatch.chdir(REPOSITORY)
    params = replace(load_params("fizzbuzz", "train", Params), seed=seed, device="cpu")
    network, numbers = fit("fizzbuzz", TRAIN, answer(TRAIN), params), np.arange(1, 101)
    with torch.inference_mode():
        np.testing.assert_array_equal(network(torch.from_numpy(numbers)).argmax(dim=1).numpy(), answer(numbers))
