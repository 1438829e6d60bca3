"""What every stage shares: the paths of a model's files, its parameters, and errors that are a sentence."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
import yaml

import models
from models.dataset import DataError

T = TypeVar("T")
PARAMS = Path("params.yaml")

Positive = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage's section of params.yaml; its fields are the keys that it may have."""


class PipelineError(Exception):
    """A stage cannot go on; the message is for the person who started it."""


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
        raise PipelineError(f"{PARAMS} is missing: run the pipeline in the folder that holds it") from None
    except yaml.YAMLError as error:
        raise PipelineError(f"{PARAMS} is no YAML: {error}") from error
    except msgspec.ValidationError as error:
        raise PipelineError(f"{PARAMS}: models.{model}.{section}: {error}") from error


def raw(model: str) -> Path:
    """The folder for a model's raw files."""
    return Path("data", "raw", model)


def prepared(model: str) -> Path:
    """The file with a model's training and test rows."""
    return Path("data", "prepared", f"{model}.npz")


def load_rows(model: str) -> dict[str, np.ndarray]:
    """The prepared rows: the fields of models.dataset.Dataset by name. Raises PipelineError when `prepare` has not run."""
    try:
        with np.load(prepared(model)) as rows:
            return dict(rows)
    except FileNotFoundError:
        raise PipelineError(f"{prepared(model)} is missing: run `dvc repro`") from None


def folder(model: str) -> Path:
    """The folder in which a model's files lie."""
    return Path("models", model)


def main(stage: Callable[[str], None]) -> None:
    """Run a stage for the model named on the command line; exit 1 with one sentence when it cannot go on."""
    if len(sys.argv) != 2:  # noqa: PLR2004
        sys.exit(f"usage: python -m pipeline.{stage.__name__} MODEL, where MODEL is one of {', '.join(models.names())}")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        stage(sys.argv[1])
    except (PipelineError, DataError, models.UnknownModelError) as error:
        sys.exit(f"{stage.__name__} {sys.argv[1]}: {error}")
