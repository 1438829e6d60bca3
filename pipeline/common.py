"""What all stages share: paths, parameters, prepared rows and small files."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from models.dataset import Dataset
from models.files import atomic_write

T = TypeVar("T")
PARAMS = Path("params.yaml")

Positive = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage's section of params.yaml, the class `Params` of its module; the fields are the keys that it may have."""


class PipelineError(Exception):
    """A stage cannot continue; the message is shown to the user without a traceback."""


def load_sections(model: str) -> dict[str, Any]:
    """All sections of a model in params.yaml; none when it has no such model."""
    sections: dict[str, Any] = msgspec.yaml.decode(PARAMS.read_bytes())["models"].get(model, {})
    return sections


def load_params(model: str, section: str, kind: type[T]) -> T:
    """Read `models.<model>.<section>` of params.yaml. Raises PipelineError when it is missing or not a valid `kind`."""
    try:
        return msgspec.convert(load_sections(model)[section], kind)
    except KeyError:
        raise PipelineError(f"{PARAMS}: the entry models.{model}.{section} is missing") from None
    except msgspec.DecodeError as error:
        raise PipelineError(f"{PARAMS}: models.{model}.{section}: {error}") from error


class Paths:
    """Where a model's files are, relative to the repository."""

    def __init__(self, model: str) -> None:
        self.raw = Path("data", "raw", model)
        self.prepared = Path("data", "prepared", f"{model}.npz")  # training and test rows
        self.trained = Path("models", model)
        self.report = self.trained / "report"
        self.training = self.report / "training"  # learning curves and cross-validation, written before `export`


def load_rows(model: str) -> Dataset:
    """The prepared rows, which `prepare` has written."""
    with np.load(Paths(model).prepared) as rows:
        return Dataset(**{**rows, "source": str(rows["source"])})


def write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a small table for `dvc plots`; a table without rows is not plotted."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    atomic_write(path, text.getvalue().encode())
