"""The model card: the contract, metrics and origin of a trained model, as `export` writes them to card.json next to model.onnx."""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tercet.errors import InvalidInputError, StartupError

Rows = NDArray[Any]
Fingerprint = tuple[tuple[int, int, int], ...]  # of each file: modification time, size, inode


class Datatype(NamedTuple):
    """One datatype of tensors, in the words of each library."""

    dtype: np.dtype[Any]  # numpy, little-endian
    onnx_type: str  # onnxruntime
    contents_field: str  # of InferTensorContents, for typed contents


DATATYPES = {  # by their names in the Open Inference Protocol
    "UINT8": Datatype(np.dtype("u1"), "tensor(uint8)", "uint_contents"),
    "INT64": Datatype(np.dtype("<i8"), "tensor(int64)", "int64_contents"),
    "FP32": Datatype(np.dtype("<f4"), "tensor(float)", "fp32_contents"),
}

SIGNATURE = "card.json.sig"  # file next to card.json; see tercet.server.security


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: its name, its unit and the closed range of accepted values."""

    name: str
    unit: str
    minimum: int | float  # 2**63 - 1 has no exact float
    maximum: int | float

    def __post_init__(self) -> None:
        if self.minimum > self.maximum:
            raise ValueError(f"{self.name}: minimum {self.minimum:g} is greater than maximum {self.maximum:g}")


class Tensor(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A tensor. `shape` is the shape of one row; the tensor has a batch axis before it."""

    name: str
    datatype: Literal["UINT8", "INT64", "FP32"]
    shape: tuple[int, ...]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return DATATYPES[self.datatype].dtype


class Input(Tensor, frozen=True, kw_only=True):
    """The input tensor.

    `features` has one entry per column of the last axis, or a single one for every element. With `missing`, NaN is accepted and
    means "not measured".
    """

    features: tuple[Feature, ...]
    missing: bool = False

    def __post_init__(self) -> None:
        if len(self.features) not in (1, *self.shape[-1:]):
            raise ValueError(f"{self.name}: {len(self.features)} features for a row of shape {list(self.shape)}")

    @cached_property
    def _bounds(self) -> tuple[Rows, Rows] | None:
        """Minimum and maximum, to be broadcast against a row; None when every value of the datatype is accepted."""
        low, high = (np.array([getattr(feature, end) for feature in self.features]) for end in ("minimum", "maximum"))
        if self.dtype.kind in "iu" and low.min() <= np.iinfo(self.dtype).min and high.max() >= np.iinfo(self.dtype).max:
            return None
        return low.astype(self.dtype), high.astype(self.dtype)

    def check(self, rows: Rows, field: str) -> None:
        """Raise InvalidInputError unless every value of `rows`, (batch, *shape), is in its feature's range.

        `field` is the rows' field in the request; `{row}` and `{feature}` in it are filled in.
        """
        if self._bounds is None:
            return
        low, high = self._bounds
        accepted = (rows >= low) & (rows <= high)
        if np.count_nonzero(accepted) == rows.size:  # faster than accepted.all()
            return
        if self.missing:
            accepted |= np.isnan(rows)
        if not accepted.all():
            row, *rest = (int(i) for i in np.argwhere(~accepted)[0])
            feature = self.features[rest[-1] if len(self.features) > 1 else 0]
            expected = f"{feature.minimum:g} to {feature.maximum:g} {feature.unit}".strip()
            or_nan = ", or NaN (not measured)" if self.missing else ""
            text = f"{feature.name} must be {expected}{or_nan}; got {rows[(row, *rest)]:g}"
            raise InvalidInputError(field.format(row=row, feature=feature.name), text)


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes and returns. `labels` names the columns of the output: classes, or values.

    `intended_use` and `warning` are sentences for the users of the predictions; empty where the description says everything.
    """

    description: str
    input: Input
    output: Tensor
    labels: tuple[str, ...]
    intended_use: str = ""
    warning: str = ""


class Example(msgspec.Struct, frozen=True):
    """A test row, its true label (or values) and the output of the trained model."""

    input: Any
    target: Any
    output: list[Any]


class Card(Contract, frozen=True, kw_only=True):
    """A trained model. The service needs only this and model.onnx."""

    name: str
    version: str
    metrics: dict[str, float]
    data: dict[str, str]
    params: dict[str, Any]
    params_sha256: str
    git_commit: str
    files: dict[str, str]  # name -> SHA-256
    examples: tuple[Example, ...]
    cross_validation: dict[str, Any] = msgspec.field(default_factory=dict)

    def example_rows(self) -> Rows:
        """The inputs of the examples, (examples, *shape)."""
        return np.array([example.input for example in self.examples], dtype=self.input.dtype)


def fingerprint(paths: Iterable[Path]) -> Fingerprint:
    """A value that changes when one of the files is replaced, written to or removed."""
    stats = []
    for path in paths:
        with suppress(OSError):
            stats.append(path.stat())
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


def find_models(folder: Path) -> list[str]:
    """Names of the models in a folder, trained or not. Raises StartupError when it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if (path / "contract.py").is_file() or is_trained(path))
    except OSError as error:
        hint = "run from the repository, or pass the folder of trained models with --models"
        raise StartupError(f"{folder} is not a folder that can be read ({error.strerror}): {hint}") from error


def is_trained(folder: Path) -> bool:
    """Whether the pipeline has written a card into a model's folder."""
    return (folder / "card.json").is_file()


def read_card(folder: Path, verify: Callable[[bytes], None] = lambda _: None) -> Card:
    """Read card.json of a trained model. Raises StartupError when it is missing or not a model card.

    `verify` gets the bytes before they are decoded.
    """
    content = _read_file(folder / "card.json")
    verify(content)
    try:
        return msgspec.json.decode(content, type=Card)
    except msgspec.MsgspecError as error:
        raise StartupError(f"{folder / 'card.json'} is not a model card: {error}; run `dvc repro` to write it again") from error


def verify_file(folder: Path, card: Card, name: str) -> bytes:
    """Read a file of a trained model. Raises StartupError when it is missing or differs from the SHA-256 in the card."""
    path, expected = folder / name, card.files.get(name)
    content = _read_file(path)
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise StartupError(f"{path} is not the file that its card.json describes: expected SHA-256 {expected}, got {actual}")
    return content


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise StartupError(f"{path} is missing: run `dvc repro` to train the model") from None
