"""The FizzBuzz rule on 64-bit integers."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.dataset import Dataset

MINIMUM, MAXIMUM = -(2**63), 2**63 - 1
EDGES = (MINIMUM, MINIMUM + 1, -(2**32), -16, -15, -5, -3, -1, 0, 1024, 2**31, 2**32, 2**53 + 1, 2**62, MAXIMUM - 1, MAXIMUM)


def load(raw: Path) -> Dataset:  # noqa: ARG001  no raw files: the rows are computed
    """Train on 101..1023 only; test on 1..100, edge cases and 1,000 random 64-bit integers."""
    train = np.arange(101, 1024, dtype=np.int64)
    test = np.concatenate([np.arange(1, 101), np.array(EDGES), draw(1_000, seed=0)])
    return Dataset(train, answer(train), test, answer(test), "full")


def draw(count: int, seed: int) -> NDArray[np.int64]:
    """Random integers, uniform over all 64-bit integers."""
    return np.random.default_rng(seed).integers(MINIMUM, MAXIMUM, count, dtype=np.int64, endpoint=True)


def answer(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Class index of each number: 0 the number itself, 1 fizz (divisible by 3), 2 buzz (by 5), 3 fizzbuzz (by both)."""
    return np.where(numbers % 3 == 0, 1, 0) + np.where(numbers % 5 == 0, 2, 0)
