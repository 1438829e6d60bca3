"""Prepared rows are valid for the model's contract."""

import numpy as np
import pytest

from models.contract import Feature, Input
from pipeline.common import PipelineError
from pipeline.prepare import check

CONTRACT = Input(name="x", datatype="FP32", shape=(2,), features=(Feature(name="a", unit="", minimum=0, maximum=1),))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (np.zeros((3, 2), np.float64), r"expected float32 \(2,\) by the contract, got float64 \(2,\)"),
        (np.zeros((3, 4), np.float32), r"got float32 \(4,\)"),
        (np.array([[0, 0], [0, 2]], np.float32), "row 1: "),
        (np.array([[np.nan, 0]], np.float32), "row 0: "),
    ],
)
def test_rows_outside_the_contract_are_an_error(rows: np.ndarray, sentence: str) -> None:
    """The error says what the contract expects, or which row has a value out of range."""
    check(np.ones((3, 2), np.float32), CONTRACT)
    with pytest.raises(PipelineError, match=sentence):
        check(rows, CONTRACT)
