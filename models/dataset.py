"""What a data set is, and how its raw files are fetched: whole, verified, or not at all."""

import gzip
import hashlib
import http.client
import os
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SAMPLES = Path(__file__).parents[1] / "data" / "sample"
TIMEOUT = 20.0  # seconds without a byte before a mirror is given up


class DataError(Exception):
    """Raw data cannot be had or is not what it should be; the message says which file, why, and what would help."""


class Dataset(NamedTuple):
    """Rows as the contract's input tensor describes them, their targets, and `full` or `sample`.

    A classifier's targets are class indices (int64), a regression's are values of the output's shape (float32).
    """

    train_inputs: NDArray[np.generic]
    train_targets: NDArray[np.int64] | NDArray[np.float32]
    test_inputs: NDArray[np.generic]
    test_targets: NDArray[np.int64] | NDArray[np.float32]
    source: str


def verify(content: bytes, sha256: str, origin: str) -> bytes:
    """Return `content` if it has that SHA-256, else raise DataError with both checksums."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{origin} is damaged: expected SHA-256 {sha256}, found {found}")
    return content


def read_sample(path: Path, sha256: str) -> bytes:
    """Read a file of the repository, verified. Raises DataError when it is missing or damaged."""
    try:
        content = path.read_bytes()
        return verify(gzip.decompress(content) if path.suffix == ".gz" else content, sha256, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; it belongs to the repository: `git checkout {path}`") from error


def download(url: str, sha256: str) -> bytes:
    """Read a gzip file from an http, https or file URL; return its uncompressed bytes, verified.

    Raises DataError when it cannot be read, is no gzip file, or its uncompressed bytes do not have that SHA-256.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:  # noqa: S310  a mirror may be a folder
            packed = response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last when it breaks off
        raise DataError(f"{url} cannot be read: {error}") from error
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        content = decompressor.decompress(packed)
    except zlib.error as error:
        found = hashlib.sha256(packed).hexdigest()
        raise DataError(
            f"{url} is damaged ({error}): expected SHA-256 {sha256}, found {found} of a file that is no gzip"
        ) from error
    return verify(content, sha256, url)


def fetch(target: Path, sha256: str, mirrors: Sequence[str]) -> Path:
    """Make sure that `target` holds the bytes with that SHA-256, from the first mirror (a folder's URL) that has `target`.gz.

    A file already there and right is kept, one that is damaged is replaced; it appears whole or not at all.
    Raises DataError that tells what went wrong at every mirror.
    """
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    problems = []
    for mirror in mirrors:
        try:
            content = download(f"{mirror.rstrip('/')}/{target.name}.gz", sha256)
        except DataError as error:
            problems.append(str(error))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(target)
        return target
    raise DataError("; ".join(problems) or f"{target} is not there")
