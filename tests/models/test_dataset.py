"""Raw files are verified and written atomically."""

import gzip
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from models.dataset import DataError, fetch
from models.files import sha256
from models.mnist import dataset as mnist

RANDOM = np.random.default_rng(0)
DIGITS = {  # as the four files of MNIST, but of few digits
    name: RANDOM.integers(256, size=(rows, 28, 28) if "images" in name else rows, dtype=np.uint8)
    for name, rows in zip(mnist.FULL, (60, 60, 10, 10), strict=True)
}


def idx(values: np.ndarray) -> bytes:
    """The IDX file of an array."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


FULL = {name: sha256(idx(values)) for name, values in DIGITS.items()}
VICTIM = list(FULL)[1]  # the file that is damaged; one comes before it


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files in place of the full set; TERCET_MNIST_MIRROR names it."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, values in DIGITS.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values), compresslevel=0))
    monkeypatch.setattr(mnist, "FULL", FULL)
    monkeypatch.setenv(mnist.MIRROR, str(folder))
    return folder


def checksums(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of every file in a folder."""
    return {path.name: sha256(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_raw_files_are_fetched_once(mirror: Path, tmp_path: Path) -> None:
    """All files come from the mirror, a damaged one is replaced, undamaged ones need no mirror; the rows are those in the files."""
    for step in ("fetched", "damaged", "kept"):
        if step == "damaged":
            (tmp_path / "raw" / VICTIM).write_bytes(b"damaged")
        if step == "kept":
            shutil.rmtree(mirror)
        *rows, source = mnist.load(tmp_path / "raw", data="full")
        for array, values in zip(rows, DIGITS.values(), strict=True):
            np.testing.assert_array_equal(array, values)
        assert source == "full"
        assert checksums(tmp_path / "raw") == FULL


DAMAGE: dict[str, Callable[[bytes], tuple[bytes, bytes]]] = {  # compressed file -> file on the mirror, and what is read of it
    "other bytes": lambda packed: (gzip.compress(b"other"), b"other"),  # noqa: ARG005
    "truncated": lambda packed: (packed[:-100], gzip.decompress(packed)[:-92]),  # a gzip file ends with 8 bytes of its own
    "no gzip": lambda packed: (b"<html>", b"<html>"),  # noqa: ARG005
    "empty": lambda packed: (b"", b""),  # noqa: ARG005
}


@pytest.mark.parametrize("source", ["auto", "full"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_download_is_refused(mirror: Path, tmp_path: Path, damage: str, source: str) -> None:
    """The error has the file and both checksums, and the raw folder has no part of it."""
    path = mirror / f"{VICTIM}.gz"
    content, seen = DAMAGE[damage](path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        mnist.load(tmp_path / "raw", data=source)
    assert path.name in str(refused.value)
    assert re.findall(r"\b[0-9a-f]{64}\b", str(refused.value)) == [FULL[VICTIM], sha256(seen)]
    assert checksums(tmp_path / "raw").items() <= FULL.items()
    assert VICTIM not in checksums(tmp_path / "raw")


def test_a_file_that_the_mirror_lacks_is_named(mirror: Path, tmp_path: Path) -> None:
    """An incomplete mirror is an error when TERCET_MNIST_MIRROR names it; the sample is not used."""
    (mirror / f"{VICTIM}.gz").unlink()
    with pytest.raises(DataError, match=f"cannot read .*{VICTIM}.gz"):
        mnist.load(tmp_path / "raw", data="auto")


@contextmanager
def breaking_off(length: int) -> Iterator[str]:
    """The URL of a web server that sends nothing of the `length` bytes that it announces."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_next_mirror_is_tried(mirror: Path, tmp_path: Path) -> None:
    """A mirror that lacks a file or breaks the connection is skipped; when all fail, the error has the problem of each."""
    (tmp_path / "bare").mkdir()
    target = tmp_path / "raw" / VICTIM
    with breaking_off(length=100) as broken:
        failing = [(tmp_path / "bare").as_uri(), broken]
        with pytest.raises(DataError) as refused:
            fetch(target, FULL[VICTIM], failing)
        assert all(f"cannot read {url}/{VICTIM}.gz" in str(refused.value) for url in failing)
        assert not target.parent.exists()
        fetch(target, FULL[VICTIM], [*failing, mirror.as_uri()])
    assert checksums(target.parent) == {VICTIM: FULL[VICTIM]}


@pytest.fixture
def _no_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mirror is named, and the public ones have nothing."""
    monkeypatch.delenv(mnist.MIRROR, raising=False)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [tmp_path.as_uri()])


@pytest.mark.usefixtures("_no_mirror")
def test_without_a_mirror_the_sample_is_used(tmp_path: Path) -> None:
    """The warning says what is missing and how to get it; a tenth of the sample is for testing, equally many of each digit."""
    with pytest.warns(UserWarning, match=f"5,000 digits.*set {mnist.MIRROR} to .*dvc repro") as warned:
        data = mnist.load(tmp_path / "raw", data="auto")
    assert all(f"{name}.gz" in str(warned[0].message) for name in mnist.FULL)
    assert data.source == "sample"
    assert len(data.train_targets) == 9 * len(data.test_targets)
    assert len(set(np.bincount(data.test_targets, minlength=10))) == 1


@pytest.mark.usefixtures("_no_mirror")
@pytest.mark.parametrize(("data", "sentence"), [("full", "cannot read"), ("ful", "expected auto, full or sample, got 'ful'")])
def test_the_full_set_can_be_required(tmp_path: Path, data: str, sentence: str) -> None:
    """The sample never replaces a required full set, and an unknown data set is an error."""
    with pytest.raises(DataError, match=sentence):
        mnist.load(tmp_path / "raw", data=data)
