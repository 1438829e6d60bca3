"""Files are written atomically."""

from pathlib import Path

import pytest

from models.files import atomic_write


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has its old content until the new one is complete."""
    target = tmp_path / "folder" / "file"
    atomic_write(target, b"old")

    def fail(path: Path, _: bytes) -> None:
        path.touch()
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="disk full"):
            atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    atomic_write(target, b"new")
    assert [path.name for path in target.parent.iterdir() if path.suffix != ".partial"] == ["file"]
    assert target.read_bytes() == b"new"
