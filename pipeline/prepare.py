"""Fetch a model's raw data, verify it, and lay its training and test rows out as arrays."""

from typing import Any

import numpy as np

import models
from models.contract import DATATYPES, Input
from pipeline.stage import PipelineError, load_params, main, prepared, raw


def check(rows: np.ndarray, contract: Input) -> None:
    """Raise PipelineError unless `rows`, (batch, ...), are what the contract's input tensor accepts."""
    if rows.dtype != DATATYPES[contract.datatype] or rows.shape[1:] != contract.shape:
        raise PipelineError(f"rows are {rows.dtype} {rows.shape[1:]}, the contract says {contract.datatype} {contract.shape}")
    low, high = ([getattr(feature, end) for feature in contract.features] for end in ("minimum", "maximum"))
    outside = (rows < np.array(low)) | (rows > np.array(high)) | (np.isnan(rows) & (not contract.missing))
    if outside.any():
        raise PipelineError(
            f"{np.count_nonzero(outside)} values lie outside the contract's range, the first at {np.argwhere(outside)[0]}"
        )


def prepare(model: str) -> None:
    """Stage: raw files -> data/prepared/<model>.npz."""
    params = load_params(model, "prepare", dict[str, Any])
    raw(model).mkdir(parents=True, exist_ok=True)
    try:
        data = models.load(model, "dataset").load(raw(model), **params)
    except TypeError as error:
        raise PipelineError(f"params.yaml: models.{model}.prepare: {error}") from error
    for rows in (data.train_inputs, data.test_inputs):
        check(rows, models.load(model, "contract").CONTRACT.input)
    prepared(model).parent.mkdir(parents=True, exist_ok=True)
    np.savez(prepared(model), **data._asdict())
    print(f"{model}: {len(data.train_targets)} training rows, {len(data.test_targets)} test rows, data set: {data.source}")


if __name__ == "__main__":
    main(prepare)
