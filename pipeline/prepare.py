"""Fetch a model's raw data, verify it, and save its training and test rows as arrays."""

from typing import Any

import numpy as np
from tercet.card import Input
from tercet.errors import InvalidInputError

import models
from pipeline.common import Paths, PipelineError, load_params


def check(rows: np.ndarray, contract: Input) -> None:
    """Raise PipelineError unless `rows`, (batch, ...), are valid for the contract's input tensor."""
    if rows.dtype != contract.dtype or rows.shape[1:] != contract.shape:
        raise PipelineError(f"rows: expected {contract.dtype} {contract.shape} by the contract, got {rows.dtype} {rows.shape[1:]}")
    try:
        contract.check(rows, "row {row}")
    except InvalidInputError as error:
        raise PipelineError(str(error)) from error


def prepare(model: str) -> None:
    """Stage: raw files -> data/prepared/<model>.npz."""
    params = load_params(model, "prepare", dict[str, Any])
    Paths(model).raw.mkdir(parents=True, exist_ok=True)
    try:
        data = models.load(model, "dataset").load(Paths(model).raw, **params)
    except TypeError as error:
        raise PipelineError(f"params.yaml: models.{model}.prepare: {error}") from error
    for rows in (data.train_inputs, data.test_inputs):
        check(rows, models.load(model, "contract").CONTRACT.input)
    Paths(model).prepared.parent.mkdir(parents=True, exist_ok=True)
    np.savez(Paths(model).prepared, **data._asdict())
    print(f"{model}: {len(data.train_targets)} training rows, {len(data.test_targets)} test rows, data set: {data.source}")
