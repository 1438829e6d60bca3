"""Eight measurements of 768 Pima women, and whether a diabetes test within five years was positive (268 were).

Donor: National Institute of Diabetes and Digestive and Kidney Diseases / V. Sigillito, 1990; public domain.
"""

from pathlib import Path

import numpy as np

from models.dataset import SAMPLES, Dataset, read
from models.files import atomic_write

FILE = "pima-indians-diabetes.csv"
SHA256 = "1241db9c7075f9f2c732c4aef4cd9bc375905f40a28c21a4521a5ee8f6122ce6"


def load(raw: Path, *, test_fraction: float, seed: int) -> Dataset:
    """Rows in the physical units of the file (0 where not measured), split at random within each class.

    Raises DataError when the file in the repository is missing or damaged.
    """
    atomic_write(raw / FILE, read(f"{SAMPLES}/diabetes/{FILE}", SHA256))
    table = np.loadtxt(raw / FILE, delimiter=",", skiprows=1, dtype=np.float32)  # (768, 9)
    inputs, targets = table[:, :8], table[:, 8].astype(np.int64)
    test = np.zeros(len(targets), dtype=bool)
    random = np.random.default_rng(seed)
    for label in np.unique(targets):
        rows = random.permutation(np.flatnonzero(targets == label))
        test[rows[: round(len(rows) * test_fraction)]] = True
    return Dataset(inputs[~test], targets[~test], inputs[test], targets[test], "full")
