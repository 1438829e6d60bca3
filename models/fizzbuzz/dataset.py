"""The FizzBuzz rule on 10-bit numbers."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.dataset import Dataset


def load(raw: Path) -> Dataset:  # noqa: ARG001  no raw files: the rows are computed
    """Train on 101..1023, test on 1..100, the numbers of the game."""
    train, test = np.arange(101, 1024, dtype=np.int64), np.arange(1, 101, dtype=np.int64)
    return Dataset(train, answer(train), test, answer(test), "full")


def answer(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Class index of each number: 0 the number itself, 1 fizz (divisible by 3), 2 buzz (by 5), 3 fizzbuzz (by both)."""
    return np.where(numbers % 3 == 0, 1, 0) + np.where(numbers % 5 == 0, 2, 0)
