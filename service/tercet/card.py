"""A model's card: the contract, figures and origin of a trained model, as `export` wrote them beside model.onnx."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from tercet.errors import InvalidInputError, StartupError

DTYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}

SIGNATURE = "card.json.sig"  # beside card.json; see service/tercet/server/signature.py

Rows = NDArray[Any]
Datatype = Literal["UINT8", "INT64", "FP32"]


class Feature(msgspec.Struct, frozen=True):
    """One measurement: name, unit and the closed range in which a value is accepted."""

    name: str
    unit: str
    minimum: int | float  # no float is 2**63 - 1
    maximum: int | float

    def __post_init__(self) -> None:
        if self.minimum > self.maximum:
            raise ValueError(f"{self.name}: nothing lies between {self.minimum:g} and {self.maximum:g}")


class Tensor(msgspec.Struct, frozen=True, dict=True):
    """A tensor; `shape` is that of one row, before it comes the batch axis."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype, little-endian."""
        return DTYPES[self.datatype]


class Input(Tensor, frozen=True, kw_only=True):
    """The input tensor.

    `features` has one entry per column of the last axis, or one that applies to every element. With `missing`, NaN is accepted and
    means "not measured".
    """

    features: tuple[Feature, ...]
    missing: bool = False

    def __post_init__(self) -> None:
        if len(self.features) not in (1, *self.shape[-1:]):
            raise ValueError(f"{self.name}: {len(self.features)} features for a row of {list(self.shape)}")

    @cached_property
    def _bounds(self) -> tuple[Rows, Rows] | None:
        """The accepted range, broadcast against a row; None when the datatype holds nothing else."""
        low, high = (np.array([getattr(feature, end) for feature in self.features]) for end in ("minimum", "maximum"))
        if self.dtype.kind in "iu" and low.min() <= np.iinfo(self.dtype).min and high.max() >= np.iinfo(self.dtype).max:
            return None
        return low.astype(self.dtype), high.astype(self.dtype)

    def check(self, rows: Rows, where: str) -> None:
        """Raise InvalidInputError unless every value of `rows`, (batch, *shape), lies in its range.

        `where` names the field in the request; `{row}` and `{feature}` in it are filled in.
        """
        if self._bounds is None:
            return
        low, high = self._bounds
        good = (rows >= low) & (rows <= high)
        if np.count_nonzero(good) == rows.size:  # quicker than good.all()
            return
        if self.missing:
            good |= np.isnan(rows)
        if not good.all():
            row, *rest = (int(i) for i in np.argwhere(~good)[0])
            feature = self.features[rest[-1] if len(self.features) > 1 else 0]
            accepted = f"{feature.minimum:g} to {feature.maximum:g} {feature.unit}".strip()
            raise InvalidInputError(
                where.format(row=row, feature=feature.name),
                f"{rows[(row, *rest)]:g} is outside what {feature.name} can be: {accepted}"
                + ", or NaN for not measured" * self.missing,
            )


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """The input and output of a model, and the names of the output's columns: classes, or values.

    `intended_use` and `warning` are sentences for users of the predictions.
    """

    description: str
    input: Input
    output: Tensor
    labels: tuple[str, ...]
    intended_use: str = ""
    warning: str = ""


class Example(msgspec.Struct, frozen=True):
    """A test row, its true label (or values) and the output that the trained model gave."""

    input: Any
    target: Any
    output: list[Any]


class Card(Contract, frozen=True, kw_only=True):
    """The contract, figures and origin of a trained model: all that the service needs besides model.onnx."""

    name: str
    version: str
    metrics: dict[str, float]
    data: dict[str, str]
    params: dict[str, Any]
    params_sha256: str
    git_commit: str
    files: dict[str, str]
    examples: tuple[Example, ...]
    cross_validation: dict[str, Any] = msgspec.field(default_factory=dict)

    def example_rows(self) -> Rows:
        """The inputs of the examples, (examples, *shape)."""
        return np.array([example.input for example in self.examples], dtype=self.input.dtype)


def read_card(folder: Path, key: Path | None = None) -> Card:
    """Read card.json of a trained model. With the file of a public key, its signature is checked before it is parsed.

    Raises StartupError when it is not there, not signed or not a card.
    """
    path = folder / "card.json"
    try:
        content = path.read_bytes()
        if key:
            from tercet.server import signature  # noqa: PLC0415  a service that wants no signatures does without cryptography

            signature.check(content, folder, key)
        return msgspec.json.decode(content, type=Card)
    except ImportError as error:
        raise StartupError(f"signatures need cryptography: pip install 'tercet[serve]' ({error})") from error
    except FileNotFoundError:
        raise StartupError(f"{path} is missing: run `dvc repro` to train the model") from None
    except msgspec.MsgspecError as error:
        raise StartupError(f"{path} is no model card: {error}; run `dvc repro` to write it anew") from error


def verify(folder: Path, card: Card, name: str) -> bytes:
    """Read a file of a trained model. Raises StartupError when it is missing or not the one that the card describes."""
    path = folder / name
    if not path.is_file():
        raise StartupError(f"{path} is missing: run `dvc repro` to train the model")
    content = path.read_bytes()
    found, expected = hashlib.sha256(content).hexdigest(), card.files.get(name)
    if found != expected:
        raise StartupError(f"{path} is not the file that its card.json describes: expected SHA-256 {expected}, found {found}")
    return content
