"""Run one stage: `python -m pipeline STAGE MODEL`. The stage is the function of that name in the module of that name."""

import sys
import warnings
from importlib import import_module

import models
from models.dataset import DataError
from pipeline.common import PARAMS, PipelineError


def main(stage: str, model: str) -> None:
    """Run a stage for a model; on an expected error print one sentence and exit with 1."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        getattr(import_module(f"pipeline.{stage}"), stage)(model)
    except FileNotFoundError as error:
        sys.exit(f"{stage} {model}: {error.filename} is missing: run `dvc repro` in the folder of {PARAMS}")
    except (PipelineError, DataError, models.UnknownModelError) as error:
        sys.exit(f"{stage} {model}: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 3:  # noqa: PLR2004
        sys.exit("usage: python -m pipeline STAGE MODEL, as in dvc.yaml")
    main(*sys.argv[1:])
