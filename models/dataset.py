"""The form of a data set, and downloads that are verified by SHA-256 and written atomically."""

import gzip
import http.client
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.files import atomic_write, sha256

SAMPLES = Path(__file__).parents[1] / "data" / "sample"
TIMEOUT = 20.0  # seconds without a byte before the next mirror is tried


class DataError(Exception):
    """Raw data is missing or damaged; the message names the file, the reason and the remedy."""


class Dataset(NamedTuple):
    """Rows as the contract's input tensor describes them, their targets, and `full` or `sample`.

    A classifier's targets are class indices (int64); a regression's are values of the output's shape (float32).
    """

    train_inputs: NDArray[np.generic]
    train_targets: NDArray[np.int64] | NDArray[np.float32]
    test_inputs: NDArray[np.generic]
    test_targets: NDArray[np.int64] | NDArray[np.float32]
    source: str


def verify(content: bytes, expected: str, origin: str) -> bytes:
    """Return `content` if `expected` is its SHA-256, else raise DataError with both checksums."""
    if (actual := sha256(content)) != expected:
        raise DataError(f"{origin} is damaged: expected SHA-256 {expected}, got {actual}")
    return content


def read_sample(path: Path, expected: str) -> bytes:
    """Read a data file of the repository, uncompressed and verified. Raises DataError when it is missing or damaged."""
    try:
        content = path.read_bytes()
        return verify(gzip.decompress(content) if path.suffix == ".gz" else content, expected, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; restore it with `git checkout {path}`") from error


def download(url: str, expected: str) -> bytes:
    """Read a gzip file from an http, https or file URL and return its uncompressed bytes.

    Raises DataError when it cannot be read, or `expected` is not the SHA-256 of the uncompressed bytes.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:  # noqa: S310  a mirror may be a folder
            content = response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last when the connection breaks
        raise DataError(f"cannot read {url}: {error}") from error
    try:
        content = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(content)
    except zlib.error:
        return verify(content, expected, f"{url} (not a gzip file)")
    return verify(content, expected, url)


def fetch(target: Path, expected: str, mirrors: Sequence[str]) -> bytes:
    """Return the bytes of `target`, whose SHA-256 is `expected`; download `target`.gz where it is missing or damaged.

    `mirrors` are URLs of folders, tried in order. Raises DataError with the problem of each mirror when all fail.
    """
    if target.is_file() and sha256(content := target.read_bytes()) == expected:
        return content
    problems = []
    for mirror in mirrors:
        try:
            content = download(f"{mirror.rstrip('/')}/{target.name}.gz", expected)
        except DataError as error:
            problems.append(str(error))
        else:
            atomic_write(target, content)
            return content
    raise DataError("; ".join(problems) or f"{target} is missing, and there is no mirror to download it from")
