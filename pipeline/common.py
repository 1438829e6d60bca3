"""What all stages share: paths, parameters, prepared rows, small files, and error messages."""

import csv
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import yaml

import models
from models.dataset import DataError, Dataset
from models.files import atomic_write

T = TypeVar("T")
PARAMS = Path("params.yaml")

Positive = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage's section of params.yaml; the fields are the keys that it may have."""


class PipelineError(Exception):
    """A stage cannot continue; the message is shown to the user without a traceback."""


def load_params(model: str, section: str, kind: type[T]) -> T:
    """Read `models.<model>.<section>` of params.yaml as `kind`.

    Raises PipelineError when the file, the model, the section or a key is missing, unknown or of the wrong type.
    """
    try:
        tree = yaml.safe_load(PARAMS.read_text())
        for depth, key in enumerate(path := ["models", model, section]):
            if not isinstance(tree, dict) or key not in tree:
                raise PipelineError(f"{PARAMS}: the entry {'.'.join(path[: depth + 1])} is missing")
            tree = tree[key]
        return msgspec.convert(tree, kind)
    except FileNotFoundError:
        raise PipelineError(f"{PARAMS} is missing: run the pipeline in the folder that contains it") from None
    except yaml.YAMLError as error:
        raise PipelineError(f"{PARAMS} is not valid YAML: {error}") from error
    except msgspec.ValidationError as error:
        raise PipelineError(f"{PARAMS}: models.{model}.{section}: {error}") from error


def has_section(model: str, section: str) -> bool:
    """Whether params.yaml has the entry `models.<model>.<section>`, and it is not empty."""
    return bool(yaml.safe_load(PARAMS.read_text())["models"][model].get(section))


class Paths:
    """Where a model's files are, relative to the repository."""

    def __init__(self, model: str) -> None:
        self.raw = Path("data", "raw", model)
        self.prepared = Path("data", "prepared", f"{model}.npz")  # training and test rows
        self.trained = Path("models", model)
        self.report = self.trained / "report"
        self.training = self.report / "training"  # learning curves and cross-validation, written before `export`


def load_rows(model: str) -> Dataset:
    """The prepared rows. Raises PipelineError when `prepare` has not run."""
    try:
        with np.load(Paths(model).prepared) as rows:
            return Dataset(**{**rows, "source": str(rows["source"])})
    except FileNotFoundError:
        raise PipelineError(f"{Paths(model).prepared} is missing: run `dvc repro`") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a small table for `dvc plots`; a table without rows is not plotted."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    atomic_write(path, text.getvalue().encode())


def main(stage: Callable[[str], None]) -> None:
    """Run a stage for the model named on the command line; on a PipelineError print its message and exit with 1."""
    if len(sys.argv) != 2:  # noqa: PLR2004
        sys.exit(f"usage: python -m pipeline.{stage.__name__} MODEL, where MODEL is one of {', '.join(models.names())}")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        stage(sys.argv[1])
    except (PipelineError, DataError, models.UnknownModelError) as error:
        sys.exit(f"{stage.__name__} {sys.argv[1]}: {error}")
