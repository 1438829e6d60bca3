"""The form of a data set, and downloads that are verified by SHA-256 and written atomically."""

import http.client
import urllib.request
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.files import atomic_write, sha256

SAMPLES = (Path(__file__).parents[1] / "data" / "sample").as_uri()
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


def read(url: str, expected: str) -> bytes:
    """The bytes at an http, https or file URL, uncompressed if they are a gzip file.

    Raises DataError when they cannot be read, or `expected` is not the SHA-256 of the uncompressed bytes.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:  # noqa: S310  a mirror may be a folder
            content: bytes = response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last when the connection breaks
        raise DataError(f"cannot read {url}: {error}") from error
    with suppress(zlib.error):  # not a gzip file
        content = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(content)
    if (actual := sha256(content)) != expected:
        raise DataError(f"{url} is damaged: expected SHA-256 {expected}, got {actual}")
    return content


def fetch(target: Path, expected: str, mirrors: Sequence[str]) -> bytes:
    """Return the bytes of `target`, whose SHA-256 is `expected`; download `target`.gz where it is missing or damaged.

    `mirrors` are URLs of folders, tried in order. Raises DataError with the problem of each mirror when all fail.
    """
    if target.is_file() and sha256(content := target.read_bytes()) == expected:
        return content
    problems = []
    for mirror in mirrors:
        try:
            atomic_write(target, content := read(f"{mirror.rstrip('/')}/{target.name}.gz", expected))
        except DataError as error:
            problems.append(str(error))
        else:
            return content
    raise DataError("; ".join(problems))
