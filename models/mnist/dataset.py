"""MNIST (LeCun, Cortes, Burges 1998): 60,000 + 10,000 digits, or the sample of 5,000 in this repository."""

import os
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.dataset import SAMPLES, DataError, Dataset, fetch, read

FULL = {  # file name -> SHA-256 of its uncompressed bytes
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SAMPLE = {
    "mnist-5k-images-idx3-ubyte": "d880cf6cc71c80335012c59deb78e95e7b2c1d8aa8b78312f62bb489ae9ffb96",
    "mnist-5k-labels-idx1-ubyte": "e18e6fe44bbeb980f85a745210a0a269a8bb7b98201e0f223576115fd7d5dc6c",
}
SAMPLE_TEST_ROWS = 500  # the last tenth, 50 of each digit
MIRROR = "TERCET_MNIST_MIRROR"


def load(raw: Path, *, data: str) -> Dataset:
    """Load the `full` set, the `sample`, or with `auto` the full set if possible, else the sample, with a warning.

    Raises DataError when the full set is not available and `data` is `full` or TERCET_MNIST_MIRROR is set.
    """
    if data not in ("auto", "full", "sample"):
        raise DataError(f"data: expected auto, full or sample, got {data!r}")
    if data != "sample":
        try:
            return full(raw)
        except DataError as error:
            if data == "full" or os.environ.get(MIRROR):
                raise
            warnings.warn(
                f"the full MNIST is not available ({error}). Using the sample of 5,000 digits in this repository, which gives "
                f"a lower accuracy, measured on {SAMPLE_TEST_ROWS} digits. For the full set, set {MIRROR} to a folder or URL with "
                f"{', '.join(f'{name}.gz' for name in FULL)} and run `dvc repro --force --single-item prepare@mnist && dvc repro`.",
                stacklevel=2,
            )
    return sample()


def full(raw: Path) -> Dataset:
    """The official files, from `raw`, the mirror (folder or URL) that TERCET_MNIST_MIRROR names, or the public mirrors."""
    if mirror := os.environ.get(MIRROR):
        mirrors = [mirror if ":/" in mirror else Path(mirror).resolve().as_uri()]
    else:
        from torchvision.datasets import MNIST  # noqa: PLC0415  importing torchvision takes seconds: only when it is needed

        mirrors = MNIST.mirrors
    train_images, train_labels, test_images, test_labels = (idx(fetch(raw / name, hash_, mirrors)) for name, hash_ in FULL.items())
    return Dataset(train_images, train_labels.astype(np.int64), test_images, test_labels.astype(np.int64), "full")


def sample() -> Dataset:
    """4,500 digits to train on and 500 to test on, all from the official training set."""
    images, labels = (idx(read(f"{SAMPLES}/mnist/{name}.gz", hash_)) for name, hash_ in SAMPLE.items())
    cut, targets = len(images) - SAMPLE_TEST_ROWS, labels.astype(np.int64)
    return Dataset(images[:cut], targets[:cut], images[cut:], targets[cut:], "sample")


def idx(content: bytes) -> NDArray[np.uint8]:
    """Parse the IDX format: magic (0, 0, 8 = unsigned byte, rank), one big-endian size per axis, the values."""
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
